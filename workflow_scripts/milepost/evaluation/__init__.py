"""Evaluate how well a model solves a problem set: sampling, grading, and estimators with their errors."""
