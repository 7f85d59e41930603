"""The training loop and what it is made of: state, optimizer, step, checkpoints."""
