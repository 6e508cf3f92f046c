"""A tiny Qwen3.5 of the true architecture, and arithmetic for it to learn: the whole path on a laptop's CPU."""
