"""Ranked data: records, other formats, templates, tokenisation, batches."""
