"""What the training step takes on machines that are not here: compiled for them ahead of time, never run."""
