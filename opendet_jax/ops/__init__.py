"""Plain functions on arrays: boxes, assignment, suppression and deformable attention."""
