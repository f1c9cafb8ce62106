"""A save from snapshot to commit, and back; for any training loop."""
