"""Ranked data: records, the shapes other people write them in, templates, tokens, batches."""
