"""Plain functions on arrays: boxes and their suppression, loops over what is real, and deformable attention."""
