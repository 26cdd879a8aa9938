"""Compare ways to train: texts, plans of experiments, the runner and the report."""
