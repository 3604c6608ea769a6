"""Networks by name, with their initial weights."""
