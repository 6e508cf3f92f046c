"""How well a model solves a problem set: sampling, grading, estimators with their errors."""
