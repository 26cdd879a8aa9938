"""Config strings, rules, the weights that they select, and the options of a run."""
