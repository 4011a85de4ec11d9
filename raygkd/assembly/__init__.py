"""Configuration -> models, objectives and training runs."""
