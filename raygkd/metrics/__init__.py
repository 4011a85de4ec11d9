"""Scores of models, and what they cost."""
