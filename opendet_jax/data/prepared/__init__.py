"""Data sets as array_record shards, for training at scale: written, and read back."""
