"""One save by itself, and its way back: against what the memory and the disk can do."""
