"""Scores of any model on any ranked data, and how well they rank."""
