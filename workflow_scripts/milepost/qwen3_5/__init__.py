"""Qwen3.5's text model on Megatron-Core: architecture, parallel layout and kernels."""
