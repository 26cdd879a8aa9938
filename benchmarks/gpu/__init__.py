"""What a machine with one GPU can say in ten minutes: ``python -m benchmarks.gpu``."""
