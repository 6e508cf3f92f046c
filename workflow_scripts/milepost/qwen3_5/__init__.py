"""Qwen3.5's text model on Megatron-Core: what it is, how it is laid out over processes, and how it computes."""
