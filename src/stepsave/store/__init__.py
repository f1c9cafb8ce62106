"""Where bytes go: the only code that syncs, renames and removes."""
