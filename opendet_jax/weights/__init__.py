"""PyTorch checkpoints → our parameter tree."""
