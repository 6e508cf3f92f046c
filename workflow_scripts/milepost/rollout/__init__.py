"""Rollouts: prompts to token ids, and the engines that sample answers to them."""
