"""A tiny Qwen3.5 of the real architecture, and sums for it to learn: the whole pipeline on a laptop's CPU."""
