"""What is on disk: pure functions and records, no input or output."""
