"""Scores of a model on ranked data, and ranking metrics."""
