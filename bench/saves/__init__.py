"""What a save and a restore cost by themselves."""
