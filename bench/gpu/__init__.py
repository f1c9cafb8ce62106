"""The same questions on a GPU, for a machine that has one."""
