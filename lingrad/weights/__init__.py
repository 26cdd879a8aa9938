"""A weight as it is stored, and how it is read as a matrix."""
