"""Rollouts: encode prompts, and sample responses on the CPU or with SGLang."""
