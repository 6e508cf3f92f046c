"""Weights on disk: Hub and Megatron names, torch_dist, safetensors, and the manifests of result folders."""
