"""Rewards: math answers, multiple choice, exact text, and users' own functions."""
