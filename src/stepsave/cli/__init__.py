"""The command line: looks at backups, checks, compares, converts and copies them."""
