"""Qwen3.5's text model for generation on the CPU: loads weights by Hub name, returns next-token logits."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.checkpoints.name_table import HEAD_NAME, MTP, VISION, text_prefix
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.rollout.cpu_layers import (
    AttentionCache,
    DeltaNetCache,
    DenseMlp,
    Destination,
    ExpertMlp,
    GatedAttention,
    GatedDeltaNet,
    Step,
    one_plus,
)

_IGNORED = (VISION, MTP)  # not needed to generate text


class ModelCache:
    """The caches of up to ``rows`` sequences: one per layer, and each row's number of tokens."""

    def __init__(self, rows: int, architecture: Architecture):
        kinds = {"linear_attention": DeltaNetCache, "full_attention": AttentionCache}
        self.layers = [kinds[kind](rows, architecture) for kind in architecture.layer_kinds]
        self.lengths = np.zeros(rows, dtype=np.int64)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens in every row."""
        for layer in self.layers:
            layer.reserve(length)

    def insert(self, rows: slice, source: "ModelCache", row: int) -> None:
        """Start the sequences ``rows`` as copies of one row of another cache."""
        length = int(source.lengths[row])
        self.reserve(length)
        self.lengths[rows] = length
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.insert(rows, theirs, row, length)

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy the rows ``sources`` over the rows ``targets``."""
        self.lengths[targets] = self.lengths[sources]
        for layer in self.layers:
            layer.move(torch.from_numpy(sources), torch.from_numpy(targets))


class Layer:
    """A decoder layer: token mixer and MLP, each with a pre-norm and a residual connection."""

    def __init__(self, kind: str, architecture: Architecture):
        a = architecture
        self.mixer = GatedDeltaNet(a) if kind == "linear_attention" else GatedAttention(a)
        self.mlp = ExpertMlp(a) if a.is_moe else DenseMlp(a.hidden_size, a.ffn_hidden_size)
        self.mixer_norm, self.mlp_norm = torch.empty(a.hidden_size), torch.empty(a.hidden_size)

    def destinations(self) -> dict[str, Destination]:
        """Hub name within the layer -> destination."""
        return {
            "input_layernorm.weight": Destination(self.mixer_norm, one_plus),
            "post_attention_layernorm.weight": Destination(self.mlp_norm, one_plus),
            **self.mixer.destinations(),
            **self.mlp.destinations(),
        }


class CpuModel:
    """The text model in fp32, with its two forward passes, `prefill` and `decode`.

    Args:
        folder: a checkpoint in the Hub's format (config.json and \\*.safetensors).
    """

    def __init__(self, folder: Path):
        self.architecture = a = Architecture.from_folder(folder)
        self.embedding = torch.empty(a.vocab_size, a.hidden_size)
        self.head = self.embedding if a.tie_embeddings else torch.empty(a.vocab_size, a.hidden_size)
        self.final_norm = torch.empty(a.hidden_size)
        self.layers = [Layer(kind, a) for kind in a.layer_kinds]
        rotary = int(a.head_dim * a.rotary_percent)
        self.frequencies = a.rotary_base ** -(torch.arange(0, rotary, 2).float() / rotary)  # (rotary / 2,)

        hub = HubCheckpoint(folder)
        text = text_prefix(hub)
        self._destinations = {
            f"{text}embed_tokens.weight": Destination(self.embedding),
            f"{text}norm.weight": Destination(self.final_norm, one_plus),
            HEAD_NAME: Destination(self.head),  # some checkpoints store it though it is tied to the embedding
        }
        for index, layer in enumerate(self.layers):
            for name, destination in layer.destinations().items():
                self._destinations[f"{text}layers.{index}.{name}"] = destination
        loaded = self.load((name, hub.read(name)) for name in hub if not name.startswith(_IGNORED))
        missing = self._destinations.keys() - loaded - ({HEAD_NAME} if a.tie_embeddings else set())
        if missing:
            raise UserError(f"{folder}: no tensor {min(missing)} ({len(missing)} missing): use a complete checkpoint")

    def load(self, named: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors into the model by Hub name and return the names loaded.

        The vision tower's and the MTP layer's are ignored; another unknown name or a wrong shape raises a ValueError.
        """
        taken = set()
        for name, tensor in _expert_by_expert(named):
            if name.startswith(_IGNORED):
                continue
            if name not in self._destinations:
                raise ValueError(f"{name}: no such tensor in this model")
            destination = self._destinations[name]
            value = destination.transform(tensor.detach().float())
            if value.shape != destination.tensor.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit this model")
            destination.tensor.copy_(value)
            taken.add(name)
        return taken

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, ModelCache]:
        """Read P prompts; return their next tokens' logits (P, vocabulary) and a cache with a row for each."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = int(lengths.max())
        ids = torch.tensor([prompt + [0] * (tokens - len(prompt)) for prompt in prompts])  # (P, T)
        cache = ModelCache(len(prompts), self.architecture)
        cache.reserve(tokens)
        cache.lengths[:] = lengths.numpy()
        cos, sin = self._angles(torch.arange(tokens))
        x = F.embedding(ids, self.embedding)  # (P, T, H)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            normed = self._norm(x, layer.mixer_norm)
            if isinstance(layer.mixer, GatedDeltaNet):
                x += layer.mixer.prefill(normed, lengths, layer_cache)
            else:
                x += layer.mixer.prefill(normed, cos, sin, layer_cache)
            x += layer.mlp(self._norm(x, layer.mlp_norm).flatten(0, 1)).view_as(x)
        return self._logits(x[torch.arange(len(prompts)), lengths - 1]), cache

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """Append one token (n,) to each of the cache's first n sequences; return the next logits (n, vocabulary)."""
        n = len(tokens)
        step = self._step(cache.lengths[:n])
        cache.lengths[:n] += 1
        cache.reserve(step.mask.shape[-1])
        x = F.embedding(tokens, self.embedding)  # (n, H)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x += layer.mixer.decode(self._norm(x, layer.mixer_norm), layer_cache, step)
            x += layer.mlp(self._norm(x, layer.mlp_norm))
        return self._logits(x)

    def _step(self, lengths: np.ndarray) -> Step:
        positions = torch.from_numpy(lengths.copy())
        cos, sin = self._angles(positions)
        beyond = torch.arange(int(lengths.max()) + 1) > positions[:, None]  # (n, L)
        mask = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None]
        return Step(torch.arange(len(positions)), positions, cos, sin, mask)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions (N,), each (N, 1, rotary / 2)."""
        angles = (positions[:, None] * self.frequencies)[:, None]
        return angles.cos(), angles.sin()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.architecture.norm_epsilon)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._norm(x, self.final_norm), self.head)


def _expert_by_expert(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Split tensors that hold all experts of a layer, as the Hub's do; pass on the others unchanged."""
    for name, tensor in named:
        prefix, _, packed = name.rpartition(".")
        if not (prefix.endswith(".mlp.experts") and packed in ("gate_up_proj", "down_proj")):
            yield name, tensor
            continue
        for expert, weights in enumerate(tensor):
            parts = weights.chunk(2) if packed == "gate_up_proj" else [weights]
            for part, weight in zip(packed.removesuffix("_proj").split("_"), parts, strict=True):
                yield f"{prefix}.{expert}.{part}_proj.weight", weight
