"""What a save uses beside time: CPU, memory, system calls, calls."""
