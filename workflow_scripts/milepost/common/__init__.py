"""Helpers for every other package; nothing here depends on models or training."""
