"""From raw JSON to the published tables and pictures."""
