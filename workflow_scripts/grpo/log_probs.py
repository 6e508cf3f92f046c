"""Log-probs of chosen tokens without ever holding the logits of all positions.

Over a 248,320-token vocabulary the fp32 logits of one 9,216-token pack are 9 GB. Here a chunk of positions has its
logits made, reduced to a few numbers a position and dropped; the backward pass makes them again, chunk by chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk: int,
    with_entropy: bool = False,
    tensor_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``targets`` under softmax(hidden @ weight.T / temperature), as the rollout sampled from it.

    Args:
        hidden: (N, H) final hidden states of the positions that predict the targets, whole on every tensor-parallel
            rank; its gradient comes back whole too.
        weight: (V / ranks, H) this rank's rows of the output weight, ranks in the order of the vocabulary.
        targets: (N,) token ids.
        chunk: positions whose logits exist at one time.
        tensor_group: the ranks that share the vocabulary; None for one.

    Returns:
        log-probs (N,) and entropies in nats (N,) or None, in fp32 (fp64 for fp64 input), both differentiable.
    """
    log_probs, entropy = _ChunkedLogProbs.apply(hidden, weight, targets, temperature, chunk, with_entropy, tensor_group)
    return log_probs, entropy if with_entropy else None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        number, precise = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        log_normaliser = hidden.new_empty(number, dtype=precise)  # log of the sum of exp(logit)
        target_logit = torch.empty_like(log_normaliser)
        entropy = hidden.new_zeros(number if with_entropy else 0, dtype=precise)
        for span in _spans(number, chunk):
            logits = _logits(hidden[span], weight, temperature)  # (C, V / ranks)
            maximum = _all_reduce(logits.amax(dim=1), group, dist.ReduceOp.MAX)
            target_logit[span] = _all_reduce(_pick(logits, targets[span], group), group)
            if with_entropy:
                shifted = logits - maximum[:, None]
                exponential = shifted.exp()
                sums = torch.stack([exponential.sum(dim=1), (exponential * shifted).sum(dim=1)])  # (2, C)
                total, weighted = _all_reduce(sums, group)
                entropy[span] = total.log() - weighted / total
            else:
                total = _all_reduce(logits.sub_(maximum[:, None]).exp_().sum(dim=1), group)
            log_normaliser[span] = maximum + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_normaliser, entropy)
        ctx.temperature, ctx.chunk, ctx.group = temperature, chunk, group
        ctx.set_materialize_grads(False)
        return target_logit - log_normaliser, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """With p = softmax and H its entropy: d log p[t] / d logit = onehot[t] - p, d H / d logit = -p (log p + H)."""
        hidden, weight, targets, log_normaliser, entropy = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_normaliser)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=log_normaliser.dtype) if ctx.needs_input_grad[1] else None
        for span in _spans(hidden.shape[0], ctx.chunk):
            log_p = _logits(hidden[span], weight, ctx.temperature).sub_(log_normaliser[span, None])
            p = log_p.exp()  # (C, V / ranks)
            if grad_entropy is None:
                grad_logits = p.mul_(-grad_log_probs[span, None])
            else:
                grad_logits = p * (
                    -grad_log_probs[span, None] - grad_entropy[span, None] * (log_p + entropy[span, None])
                )
            _add_at(grad_logits, targets[span], grad_log_probs[span], ctx.group)
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[span] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[span]
        if grad_hidden is not None:
            grad_hidden = _all_reduce(grad_hidden, ctx.group)
        return grad_hidden, grad_weight, None, None, None, None, None


def _spans(number: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, number)) for start in range(0, number, chunk)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """fp32 logits over the temperature. Rounding them to bf16 on the way would cost log-probs up to 0.1."""
    if hidden.dtype in (torch.float32, torch.float64):
        logits = hidden @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.T.float()  # no mixed-dtype matrix product on CPU
    return logits if temperature == 1.0 else logits.div_(temperature)


def _all_reduce(values: Tensor, group: ProcessGroup | None, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, operation, group)
    return values


def _local(targets: Tensor, rows: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Column of each target within this rank's part of the vocabulary, and whether it lies there."""
    local = targets - (group.rank() * rows if group is not None else 0)
    inside = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1)[:, None], inside


def _pick(logits: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
    """logits[i, targets[i]], 0 where another rank holds that column."""
    column, inside = _local(targets, logits.shape[1], group)
    return logits.gather(1, column)[:, 0] * inside


def _add_at(matrix: Tensor, targets: Tensor, values: Tensor, group: ProcessGroup | None) -> None:
    """matrix[i, targets[i]] += values[i], where this rank holds that column."""
    column, inside = _local(targets, matrix.shape[1], group)
    matrix.scatter_add_(1, column, (values * inside)[:, None])
