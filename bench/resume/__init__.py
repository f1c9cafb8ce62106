"""How long it takes to come back to a place in the data."""
