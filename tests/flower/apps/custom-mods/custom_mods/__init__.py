"""custom_mods: a Flower app."""
