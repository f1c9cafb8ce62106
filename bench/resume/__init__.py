"""How long an interrupted fit takes to go on where it was, by source of its data."""
