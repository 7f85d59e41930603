"""What a checkpoint is: which files are whole, which config made it, and what inference needs of it."""
