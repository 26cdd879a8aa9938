"""Benchmarks: lingrad beside other implementations, on the same work, in one process."""
