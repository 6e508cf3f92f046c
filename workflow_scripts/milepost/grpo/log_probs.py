"""Log-probs of given tokens without the logits of all positions in memory at once.

Over a 248,320-token vocabulary the fp32 logits of a 9,216-token pack take 9 GB. Here the logits of one chunk of
positions at a time are computed, reduced to a few numbers per position and dropped; backward recomputes them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from milepost.qwen3_5.fusion import fused


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
    """Log-probs of ``targets`` under softmax(hidden @ weight.T / temperature), the distribution of the rollout.

    Args:
        hidden: (N, H) final hidden states of the positions that predict the targets, complete on every tensor-parallel
            rank, as is its gradient.
        weight: (V / ranks, H) this rank's rows of the output weight, in rank order.
        targets: (N,) token ids.
        chunk: the number of positions whose logits are in memory at once.
        tensor_group: the ranks that shard the vocabulary; None for a single one.

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
            logits = _logits(hidden[span], weight)  # (C, V / ranks)
            target_logit[span] = _all_reduce(_pick(logits, targets[span], group), group) / temperature
            own_maximum, sums = _softmax_sums(logits, temperature=temperature, with_entropy=with_entropy)
            maximum = _all_reduce(own_maximum.clone(), group, dist.ReduceOp.MAX)
            lower = own_maximum - maximum
            if with_entropy:
                sums = torch.stack([sums[0], sums[1] + lower * sums[0]])
            sums = _all_reduce(sums * lower.exp(), group)
            log_normaliser[span] = maximum + sums[0].log()
            if with_entropy:
                entropy[span] = sums[0].log() - sums[1] / sums[0]
        log_probs = target_logit - log_normaliser
        ctx.save_for_backward(hidden, weight, targets, log_normaliser, log_probs, entropy)
        ctx.temperature, ctx.chunk, ctx.group = temperature, chunk, group
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """With p = softmax and H its entropy: d log p[t] / d logit = onehot[t] - p, d H / d logit = -p (log p + H)."""
        hidden, weight, targets, log_normaliser, log_probs, entropy = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_normaliser)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=log_normaliser.dtype) if ctx.needs_input_grad[1] else None
        for span in _spans(hidden.shape[0], ctx.chunk):
            of_entropy = () if grad_entropy is None else (grad_entropy[span], entropy[span])
            of_log_prob = grad_log_probs[span], *of_entropy
            grad_logits = _softmax_gradient(
                _logits(hidden[span], weight),
                log_normaliser[span],
                *of_log_prob,
                temperature=ctx.temperature,
                dtype=hidden.dtype,
            )
            of_target = (grad_log_probs[span] + _log_p_gradient(log_probs[span], *of_log_prob)) / ctx.temperature
            _put(grad_logits, targets[span], of_target, ctx.group)
            if grad_hidden is not None:
                grad_hidden[span] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[span])
        if grad_hidden is not None:
            grad_hidden = _all_reduce(grad_hidden, ctx.group)
        return grad_hidden, grad_weight, None, None, None, None, None


@fused
def _softmax_sums(logits: Tensor, *, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """With z = logit / temperature and m its maximum (C,): m, and the sums of exp(z - m) and of exp(z - m) (z - m)."""
    scaled = logits if temperature == 1.0 else logits / temperature
    maximum = scaled.amax(dim=1)
    shifted = scaled - maximum[:, None]
    exponential = shifted.exp()
    sums = [exponential.sum(dim=1)]
    if with_entropy:
        sums.append((exponential * shifted).sum(dim=1))
    return maximum, torch.stack(sums)


@fused
def _softmax_gradient(
    logits: Tensor, log_normaliser: Tensor, *of_log_prob: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """The gradient of logits (C, V) without the extra term at each target; ``of_log_prob`` are (C,) each."""
    scaled = logits if temperature == 1.0 else logits / temperature
    log_p = scaled - log_normaliser[:, None]
    gradient = _log_p_gradient(log_p, *(x[:, None] for x in of_log_prob))
    return (gradient if temperature == 1.0 else gradient / temperature).to(dtype)


def _log_p_gradient(
    log_p: Tensor, of_log_prob: Tensor, of_entropy: Tensor | None = None, entropy: Tensor | None = None
) -> Tensor:
    if of_entropy is None:
        return log_p.exp() * -of_log_prob
    return log_p.exp() * (-of_log_prob - of_entropy * (log_p + entropy))


def _spans(number: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, number)) for start in range(0, number, chunk)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits. Rounding them to bf16 would change log-probs by up to 0.1."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.T.float()  # no mixed-dtype matrix product on CPU


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; on CUDA the product is not rounded to the inputs' narrower dtype first."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _all_reduce(values: Tensor, group: ProcessGroup | None, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, operation, group)
    return values


def _local(targets: Tensor, rows: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's shard of the vocabulary, and whether it is in this shard."""
    local = targets - (group.rank() * rows if group is not None else 0)
    inside = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1)[:, None], inside


def _pick(logits: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
    """logits[i, targets[i]], or 0 if another rank holds that column."""
    column, inside = _local(targets, logits.shape[1], group)
    return logits.gather(1, column)[:, 0] * inside


def _put(matrix: Tensor, targets: Tensor, values: Tensor, group: ProcessGroup | None) -> None:
    """matrix[i, targets[i]] = values[i] if this rank holds that column."""
    column, inside = _local(targets, matrix.shape[1], group)
    kept = matrix.gather(1, column)[:, 0]
    matrix.scatter_(1, column, torch.where(inside, values.to(matrix.dtype), kept)[:, None])
