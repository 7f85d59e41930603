"""Work shared among devices and processes: the mesh, where each array lies on it, what processes tell each other."""
