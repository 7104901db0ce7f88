"""pytorch_advanced: a Flower app."""
