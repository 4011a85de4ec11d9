"""Deployment of models: loading, running and exporting them."""
