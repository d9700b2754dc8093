"""Parsing of a judge's answer."""
