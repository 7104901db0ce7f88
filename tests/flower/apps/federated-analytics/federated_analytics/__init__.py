"""federated_analytics: a Flower app."""
