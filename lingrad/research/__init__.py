"""Comparing methods: texts, models, plans of methods, the runner, and reports of what it measured."""
