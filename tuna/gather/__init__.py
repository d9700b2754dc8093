"""Responses gathered and ranked: by a teacher, by the student itself, by a judge."""
