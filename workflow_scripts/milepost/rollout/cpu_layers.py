"""The layers of Qwen3.5 for generation on the CPU: plain tensors, fp32, a whole prompt or one token at a time.

Each layer fuses the projections of its input into one matrix. `destinations` tells which part of which buffer a tensor
of the Hub's format goes to. Sizes in shape comments: P prompts, T tokens a prompt (padded on the right), n running
sequences, H hidden, K and V key and value heads of Gated DeltaNet, R = V / K, Dk and Dv their dims, W the width of the
convolution; in attention Q query heads, G key-value groups, D the head dim, L tokens in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.qwen3_5.architecture import Architecture

_CHUNK = 64  # tokens per chunk of Gated DeltaNet's prefill
_CACHE_BLOCK = 128  # tokens by which the key-value cache grows
_L2_EPSILON = 1e-6


@dataclass(frozen=True)
class Destination:
    """The part of a layer's buffer that holds one Hub tensor, and the transform applied on loading."""

    tensor: Tensor
    transform: Callable[[Tensor], Tensor] = lambda tensor: tensor


def one_plus(weight: Tensor) -> Tensor:
    """Qwen3.5's norms scale by (1 + weight), except the one within Gated DeltaNet."""
    return 1 + weight


@dataclass(frozen=True)
class Step:
    """The inputs that all attention layers share in one decoding step of n sequences."""

    rows: Tensor  # (n,) 0 ... n-1
    positions: Tensor  # (n,) of the input token
    cos: Tensor  # (n, 1, rotary / 2)
    sin: Tensor  # (n, 1, rotary / 2)
    mask: Tensor  # (n, 1, 1, L) 0 up to the position, -inf beyond


class DeltaNetCache:
    """Gated DeltaNet's cache: each sequence's recurrent state and the last W - 1 inputs of the convolution."""

    def __init__(self, rows: int, architecture: Architecture):
        a = architecture
        value_heads_per_key = a.linear_num_value_heads // a.linear_num_key_heads
        self.state = torch.empty(
            rows, a.linear_num_key_heads, a.linear_key_head_dim, value_heads_per_key * a.linear_value_head_dim
        )
        channels = (
            2 * a.linear_num_key_heads * a.linear_key_head_dim + a.linear_num_value_heads * a.linear_value_head_dim
        )
        # Oldest first. All sequences step together, so a step rotates the buffers instead of shifting their content.
        self.inputs = [torch.empty(rows, channels) for _ in range(a.linear_conv_kernel_dim - 1)]

    def reserve(self, length: int) -> None:
        """The state's size does not depend on the length."""

    def insert(self, rows: slice, source: "DeltaNetCache", row: int, length: int) -> None:
        """Copy one row of another cache into ``rows``."""
        self.state[rows] = source.state[row]
        for mine, theirs in zip(self.inputs, source.inputs, strict=True):
            mine[rows] = theirs[row]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the rows ``sources`` over the rows ``targets``."""
        for buffer in (self.state, *self.inputs):
            buffer[targets] = buffer[sources]


class AttentionCache:
    """Keys (after norm and rotation) and values, (rows, G, capacity, D)."""

    def __init__(self, rows: int, architecture: Architecture):
        # Zeros, since masked values must still be finite.
        self.keys = torch.zeros(rows, architecture.num_query_groups, 0, architecture.head_dim)
        self.values = torch.zeros_like(self.keys)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens in every row."""
        missing = length - self.keys.shape[2]
        if missing > 0:
            blocks = -(-missing // _CACHE_BLOCK)
            self.keys = F.pad(self.keys, (0, 0, 0, blocks * _CACHE_BLOCK))
            self.values = F.pad(self.values, (0, 0, 0, blocks * _CACHE_BLOCK))

    def insert(self, rows: slice, source: "AttentionCache", row: int, length: int) -> None:
        """Copy the first ``length`` tokens of one row of another cache into ``rows``."""
        self.keys[rows, :, :length] = source.keys[row, :, :length]
        self.values[rows, :, :length] = source.values[row, :, :length]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the rows ``sources`` over the rows ``targets``."""
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]


class GatedDeltaNet:
    """Linear attention with a gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464)."""

    def __init__(self, architecture: Architecture):
        a = architecture
        self.key_heads, self.value_heads = a.linear_num_key_heads, a.linear_num_value_heads
        self.repeats = self.value_heads // self.key_heads
        self.key_dim, self.value_dim = a.linear_key_head_dim, a.linear_value_head_dim
        self.epsilon = a.norm_epsilon
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.channels = 2 * keys + values
        self.parts = (self.channels, values, self.value_heads, self.value_heads)  # query-key-value, z, beta, alpha
        self.in_proj = torch.empty(sum(self.parts), a.hidden_size)
        self.conv = torch.empty(a.linear_conv_kernel_dim, self.channels)  # oldest token first
        self.decay_rate = torch.empty(self.value_heads)  # -exp(A_log)
        self.dt_bias = torch.empty(self.value_heads)
        self.norm = torch.empty(self.value_dim)
        self.out_proj = torch.empty(a.hidden_size, values)
        # The L2 norm is an RMS norm times 1 / sqrt(Dk); queries get another 1 / sqrt(Dk), the attention scale.
        self.query_key_scale = torch.tensor([1 / self.key_dim, self.key_dim**-0.5]).view(2, 1, 1)

    def destinations(self) -> dict[str, Destination]:
        """Hub name within the layer -> its place."""
        qkv, z, beta, alpha = self.in_proj.split(self.parts)
        return {
            "linear_attn.in_proj_qkv.weight": Destination(qkv),
            "linear_attn.in_proj_z.weight": Destination(z),
            "linear_attn.in_proj_b.weight": Destination(beta),
            "linear_attn.in_proj_a.weight": Destination(alpha),
            "linear_attn.conv1d.weight": Destination(self.conv, lambda weight: weight[:, 0].t()),
            "linear_attn.A_log": Destination(self.decay_rate, lambda a_log: -a_log.exp()),
            "linear_attn.dt_bias": Destination(self.dt_bias),
            "linear_attn.norm.weight": Destination(self.norm),
            "linear_attn.out_proj.weight": Destination(self.out_proj),
        }

    def decode(self, x: Tensor, cache: DeltaNetCache, step: Step) -> Tensor:
        """One token for each of n sequences, (n, H) -> (n, H); advances the cache's first n rows."""
        n = len(x)
        qkv, z, beta, alpha = F.linear(x, self.in_proj).split(self.parts, -1)
        query_key, value = self._queries_keys_values(self._convolve_step(qkv, cache))
        query_key = query_key.transpose(1, 2).reshape(n * self.key_heads, 2, self.key_dim)
        query, key = query_key.unbind(1)
        decay = self._wide(self._log_decay(alpha).exp_())  # (n K, 1, R Dv)
        # The delta rule: S <- g S + k (x) beta (v - g S k), and the output S q from the same read of the old state.
        state = cache.state[:n].view(n * self.key_heads, self.key_dim, -1)  # (n K, Dk, R Dv)
        read = torch.bmm(query_key, state).mul_(decay)  # (n K, 2, R Dv)
        delta = (value.reshape(n * self.key_heads, 1, -1) - read[:, 1:]).mul_(self._wide(beta.sigmoid()))
        state.mul_(decay).baddbmm_(key[:, :, None], delta)
        output = torch.addcmul(read[:, 0], (query * key).sum(-1, keepdim=True), delta[:, 0])
        return self._project_out(output.reshape(n, self.value_heads, self.value_dim), z)

    def prefill(self, x: Tensor, lengths: Tensor, cache: DeltaNetCache) -> Tensor:
        """Whole prompts, (P, T, H) -> (P, T, H); the cache's P rows get the states after ``lengths`` (P,) tokens."""
        count, tokens, _ = x.shape
        qkv, z, beta, alpha = F.linear(x, self.in_proj).split(self.parts, -1)
        width = len(self.conv)
        padded = F.pad(qkv, (0, 0, width - 1, 0))  # (P, W - 1 + T, channels)
        for shift, inputs in enumerate(cache.inputs):
            inputs.copy_(padded[torch.arange(count), lengths + shift])
        mixed = sum(padded[:, shift : shift + tokens] * self.conv[shift] for shift in range(width))
        query_key, value = self._queries_keys_values(F.silu(mixed))
        query, key = query_key.repeat_interleave(self.repeats, 3).unbind(2)  # (P, T, V, Dk) each
        # A padding token neither decays the state nor writes to it.
        real = (torch.arange(tokens) < lengths[:, None])[..., None]  # (P, T, 1)
        output, state = chunked_delta_rule(
            query, key, value, self._log_decay(alpha) * real, beta.sigmoid() * real
        )  # (P, T, V, Dv), (P, V, Dk, Dv)
        state = state.view(count, self.key_heads, self.repeats, self.key_dim, self.value_dim).transpose(2, 3)
        cache.state.copy_(state.reshape(cache.state.shape))
        return self._project_out(output, z)

    def _convolve_step(self, new: Tensor, cache: DeltaNetCache) -> Tensor:
        mixed = new * self.conv[-1]
        for inputs, weight in zip(cache.inputs, self.conv[:-1], strict=True):
            mixed.addcmul_(inputs[: len(new)], weight)
        oldest = cache.inputs.pop(0)
        oldest[: len(new)] = new
        cache.inputs.append(oldest)
        return F.silu(mixed, inplace=True)

    def _queries_keys_values(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """(..., channels) -> unit queries (scaled) and keys (..., 2, K, Dk), and values (..., V, Dv)."""
        query_key, value = mixed.split((self.channels - self.parts[1], self.parts[1]), -1)
        query_key = query_key.unflatten(-1, (2, self.key_heads, self.key_dim))
        query_key = F.rms_norm(query_key, (self.key_dim,), eps=_L2_EPSILON / self.key_dim) * self.query_key_scale
        return query_key, value.unflatten(-1, (self.value_heads, self.value_dim))

    def _log_decay(self, alpha: Tensor) -> Tensor:
        return F.softplus(alpha + self.dt_bias).mul_(self.decay_rate)

    def _wide(self, per_head: Tensor) -> Tensor:
        """(n, V) -> (n K, 1, R Dv): one value for every column of the state."""
        wide = per_head[..., None].expand(-1, -1, self.value_dim)
        return wide.reshape(len(per_head) * self.key_heads, 1, self.repeats * self.value_dim)

    def _project_out(self, output: Tensor, z: Tensor) -> Tensor:
        """(..., V, Dv), gate (..., V Dv) -> (..., H)."""
        normed = F.rms_norm(output, (self.value_dim,), self.norm, self.epsilon)
        return F.linear(normed.flatten(-2).mul_(F.silu(z)), self.out_proj)


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over whole sequences from a zero state, chunk by chunk.

    Within a chunk the writes depend on each other through a unit lower triangular system (the WY form of Yang et al.
    2024, arXiv 2412.06464, section 3.3); from chunk to chunk only the state is carried.

    Args:
        query, key: (P, T, V, Dk), normalised, the query scaled.
        value: (P, T, V, Dv).
        log_decay, beta: (P, T, V), the logarithm of the decay (at most 0) and the writing strength.

    Returns:
        Outputs (P, T, V, Dv) and final states (P, V, Dk, Dv).
    """
    tokens = query.shape[1]
    size = min(tokens, _CHUNK)
    query, key, value, log_decay, beta = (
        _in_chunks(tensor, size) for tensor in (query, key, value, log_decay[..., None], beta[..., None])
    )  # (P, V, chunks, C, ...)
    since_start = log_decay.cumsum(-2)  # (P, V, chunks, C, 1)
    to_end = since_start[..., -1:, :] - since_start
    past = torch.ones(size, size, dtype=torch.bool).tril()
    between = _decay((since_start - since_start.mT).masked_fill_(~past, -torch.inf))  # (P, V, chunks, C, C)
    query_from_start, key_from_start = query * _decay(since_start), key * _decay(since_start)
    key_to_end = key * _decay(to_end)
    whole = _decay(since_start[..., -1:, :])

    system = (key @ key.mT).mul_(between).mul_(beta)
    right = torch.cat([value, key_from_start], -1).mul_(beta)
    # The solver reads only the part below the diagonal and assumes ones on it.
    writes, reads = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        (value.shape[-1], key.shape[-1]), -1
    )
    scores = (query @ key.mT).mul_(between)

    state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    outputs = torch.empty_like(value)
    for chunk in range(query.shape[2]):
        written = writes[:, :, chunk] - reads[:, :, chunk] @ state
        outputs[:, :, chunk] = query_from_start[:, :, chunk] @ state + scores[:, :, chunk] @ written
        state = state * whole[:, :, chunk] + key_to_end[:, :, chunk].mT @ written
    return outputs.flatten(2, 3)[:, :, :tokens].transpose(1, 2), state


def _in_chunks(tensor: Tensor, size: int) -> Tensor:
    """(P, T, V, ...) -> (P, V, chunks, C, ...), zeros after the last token."""
    tensor = F.pad(tensor.transpose(1, 2), (0, 0, 0, -tensor.shape[1] % size))
    return tensor.unflatten(2, (-1, size))


def _decay(logarithm: Tensor) -> Tensor:
    """exp(logarithm), or 0 below 1e-26: smaller values approach denormal numbers, which are 100 times slower."""
    return torch.where(logarithm > -60, logarithm, -torch.inf).exp_()


class GatedAttention:
    """Full attention with grouped queries, norms on queries and keys, and a sigmoid output gate."""

    def __init__(self, architecture: Architecture):
        a = architecture
        self.heads, self.groups, self.head_dim = a.num_attention_heads, a.num_query_groups, a.head_dim
        self.epsilon = a.norm_epsilon
        # Rows: for each head its query and its gate; then all keys; then all values.
        self.parts = (2 * self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim)
        self.in_proj = torch.empty(sum(self.parts), a.hidden_size)
        self.query_norm, self.key_norm = torch.empty(self.head_dim), torch.empty(self.head_dim)
        self.out_proj = torch.empty(a.hidden_size, self.heads * self.head_dim)

    def destinations(self) -> dict[str, Destination]:
        """Hub name within the layer -> its place."""
        query, key, value = self.in_proj.split(self.parts)
        return {
            "self_attn.q_proj.weight": Destination(query),
            "self_attn.k_proj.weight": Destination(key),
            "self_attn.v_proj.weight": Destination(value),
            "self_attn.q_norm.weight": Destination(self.query_norm, one_plus),
            "self_attn.k_norm.weight": Destination(self.key_norm, one_plus),
            "self_attn.o_proj.weight": Destination(self.out_proj),
        }

    def decode(self, x: Tensor, cache: AttentionCache, step: Step) -> Tensor:
        """One token for each of n sequences, (n, H) -> (n, H); appended to the cache's first n rows."""
        n, length = len(x), step.mask.shape[-1]
        query, gate, key, value = self._project_in(x, step.cos, step.sin)
        cache.keys[step.rows, :, step.positions] = key
        cache.values[step.rows, :, step.positions] = value
        # The query heads of a group take the token dimension, so keys and values need not be repeated for them.
        output = F.scaled_dot_product_attention(
            query.view(n, self.groups, -1, self.head_dim),
            cache.keys[:n, :, :length],
            cache.values[:n, :, :length],
            attn_mask=step.mask,
        )
        return self._project_out(output.reshape(n, self.heads, self.head_dim), gate)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, cache: AttentionCache) -> Tensor:
        """Whole prompts, (P, T, H) -> (P, T, H), into the cache's P rows. No token sees the padding at the end."""
        tokens = x.shape[1]
        query, gate, key, value = self._project_in(x, cos, sin)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        cache.keys[:, :, :tokens] = key
        cache.values[:, :, :tokens] = value
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self._project_out(output.transpose(1, 2), gate)

    def _project_in(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(..., H) -> query (..., Q, D), gate (..., Q, D), key (..., G, D), value (..., G, D)."""
        query_gate, key, value = F.linear(x, self.in_proj).split(self.parts, -1)
        query, gate = query_gate.unflatten(-1, (self.heads, 2, self.head_dim)).unbind(-2)
        key, value = (part.unflatten(-1, (self.groups, self.head_dim)) for part in (key, value))
        query = F.rms_norm(query, (self.head_dim,), self.query_norm, self.epsilon)
        key = F.rms_norm(key, (self.head_dim,), self.key_norm, self.epsilon)
        return _rotate(query, cos, sin), gate, _rotate(key, cos, sin), value

    def _project_out(self, output: Tensor, gate: Tensor) -> Tensor:
        return F.linear((output * gate.sigmoid()).flatten(-2), self.out_proj)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of every head (..., heads, D) by their position's angles (..., 1, rotary / 2)."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class DenseMlp:
    """SwiGLU: down(silu(gate x) * (up x))."""

    def __init__(self, hidden: int, width: int):
        self.gate_up, self.down = torch.empty(2 * width, hidden), torch.empty(hidden, width)

    def destinations(self, prefix: str = "mlp") -> dict[str, Destination]:
        """Hub name within the layer -> its place."""
        gate, up = self.gate_up.chunk(2)
        return {
            f"{prefix}.gate_proj.weight": Destination(gate),
            f"{prefix}.up_proj.weight": Destination(up),
            f"{prefix}.down_proj.weight": Destination(self.down),
        }

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H) -> (N, H)."""
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate).mul_(up), self.down)


class ExpertMlp:
    """A mixture of experts: softmax router, weights normalised over the chosen experts, gated shared expert."""

    def __init__(self, architecture: Architecture):
        a = architecture
        self.chosen = a.experts_per_token
        self.router = torch.empty(a.num_experts, a.hidden_size)
        self.gate_up = torch.empty(a.num_experts, 2 * a.expert_ffn_hidden_size, a.hidden_size)
        self.down = torch.empty(a.num_experts, a.hidden_size, a.expert_ffn_hidden_size)
        self.shared = DenseMlp(a.hidden_size, a.shared_expert_ffn_hidden_size)
        self.shared_gate = torch.empty(1, a.hidden_size)

    def destinations(self) -> dict[str, Destination]:
        """Hub name within the layer -> its place."""
        destinations = {
            "mlp.gate.weight": Destination(self.router),
            "mlp.shared_expert_gate.weight": Destination(self.shared_gate),
            **self.shared.destinations("mlp.shared_expert"),
        }
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.chunk(2)
            destinations[f"mlp.experts.{expert}.gate_proj.weight"] = Destination(gate)
            destinations[f"mlp.experts.{expert}.up_proj.weight"] = Destination(up)
            destinations[f"mlp.experts.{expert}.down_proj.weight"] = Destination(down)
        return destinations

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H) -> (N, H)."""
        weights, experts = F.linear(x, self.router).softmax(-1).topk(self.chosen, -1)  # (N, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)  # the N * chosen visits, expert by expert
        ends = experts.flatten().bincount(minlength=len(self.router)).cumsum(0).int()
        gate, up = F.grouped_mm(x[order // self.chosen], self.gate_up.mT, offs=ends).chunk(2, -1)
        visited = F.grouped_mm(F.silu(gate).mul_(up), self.down.mT, offs=ends)
        outputs = torch.empty_like(visited)
        outputs[order] = visited
        routed = torch.bmm(weights[:, None], outputs.view(len(x), self.chosen, -1))[:, 0]
        return routed.addcmul_(F.linear(x, self.shared_gate).sigmoid_(), self.shared(x))
