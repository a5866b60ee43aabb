"""Weightings: how exact each is, and what it costs."""
