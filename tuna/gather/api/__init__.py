"""Paid calls to an OpenAI-compatible endpoint: asked, checked, written down, never paid twice."""
