"""A run: how it is built, its step, its refreshes, its checkpoints."""
