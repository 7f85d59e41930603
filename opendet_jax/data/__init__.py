"""From json and photographs (or generated scenes) to batches of static shape: see docs/data.md."""
