"""For tests of what a power cut leaves of a backup directory, and of stores of one's own."""
