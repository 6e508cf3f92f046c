"""What every other package may use, and nothing that knows of models or training."""
