"""Scores of responses: reward models and functions in Python."""
