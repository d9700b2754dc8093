"""Gathering and ranking of responses: teacher, student, judge."""
