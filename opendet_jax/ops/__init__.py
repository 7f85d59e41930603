"""Plain functions on arrays: boxes and their suppression, losses of tokens in chunks, and deformable attention."""
