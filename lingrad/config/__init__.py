"""What is written down: config strings, rules, which weights they mean."""
