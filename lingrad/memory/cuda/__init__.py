"""A model of CUDA's caching allocator, and torch's memory snapshots."""
