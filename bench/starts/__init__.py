"""How long a process takes from `fit` to its first batch, at the start and after a kill."""
