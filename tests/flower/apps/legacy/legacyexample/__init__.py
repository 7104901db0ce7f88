"""legacyexample: a Flower app."""
