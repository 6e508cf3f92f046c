"""GRPO on Megatron-Core: data, advantages, losses, packing, the optimizer's door, run state and the training loop."""
