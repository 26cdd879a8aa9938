"""One weight's subspace: its basis, its coordinates, what was merged."""
