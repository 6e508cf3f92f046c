"""The policy's forward passes over packs: old and reference log-probs, and the gradient of GRPO's loss."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from milepost.grpo.aggregations import AGGREGATIONS, StepTotals
from milepost.grpo.log_probs import token_log_probs
from milepost.grpo.losses import MAXIMA, TokenBatch, grpo_loss, has_kl_loss
from milepost.grpo.metrics import expert_metrics
from milepost.grpo.packing import pack_sequences
from milepost.grpo.responses import Responses
from milepost.grpo.samples import TrainingSequence
from milepost.grpo.settings import Settings
from milepost.qwen3_5.experts import take_expert_load
from milepost.qwen3_5.model import hidden_states, output_weight
from milepost.qwen3_5.mtp import mtp_loss
from milepost.qwen3_5.packed import Packed, context_shard, pack
from milepost.qwen3_5.routing import replay_routing, take_routing_agreement


@dataclass(frozen=True)
class MicroBatch:
    """One pack of this rank. Under context parallelism N counts the response tokens that this rank predicts.

    Attributes:
        input_ids: (1, R) token ids of the whole pack.
        position_ids: (1, R) of the whole pack.
        response_mask: (1, R) of the whole pack, true at response tokens.
        predicting: (N,) indices into this rank's rows of the positions that predict a response token.
        targets: (N,) the tokens that they predict.
        tokens: the loss's inputs for these N tokens.
        routing: (R / cp, layers, k) experts that this rank's rows visit; None if the routers choose.
    """

    input_ids: Tensor
    position_ids: Tensor
    packed: Packed
    response_mask: Tensor
    predicting: Tensor
    targets: Tensor
    tokens: TokenBatch
    routing: Tensor | None = None


class Policy:
    """The model that is trained, and if the settings need one, the reference model."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        algorithm = settings.algorithm
        self.reference = _copy_of(model) if algorithm.reference_forward or has_kl_loss(algorithm) else None
        # Samples of a prompt share its rows unless every token counts: the MTP layer needs each token's successor, and
        # an auxiliary loss is a mean over all tokens.
        self.shares_prompts = not (settings.mtp.train or model.config.moe_aux_loss_coeff)

    @property
    def learns_without_advantage(self) -> bool:
        """Whether a response with advantage 0 still has a gradient."""
        algorithm = self.settings.algorithm
        return (
            has_kl_loss(algorithm)
            or bool(algorithm.entropy_coefficient)
            or self.settings.mtp.train
            or bool(self.model.config.moe_aux_loss_coeff)
        )

    @property
    def measures_every_response(self) -> bool:
        """Whether the metrics include responses without a gradient."""
        algorithm = self.settings.algorithm
        return self.reference is not None or algorithm.entropy_metric or algorithm.old_log_prob_forward

    def micro_batches(self, sequences: Sequence[TrainingSequence], totals: StepTotals) -> list[MicroBatch]:
        """This rank's packs of an optimizer step's sequences; every data-parallel rank gets the same number."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        lengths = [len(sequence.ids) for sequence in sequences]
        sharing = parallel_state.get_tensor_model_parallel_world_size() * _context_size()  # GPUs that share a pack
        packs = pack_sequences(lengths, self.settings.training.max_tokens_per_gpu * sharing, ranks)[rank]
        return [self._micro_batch([sequences[index] for index in indices], totals) for indices in packs]

    def _micro_batch(self, sequences: Sequence[TrainingSequence], totals: StepTotals) -> MicroBatch:
        multiple = parallel_state.get_tensor_model_parallel_world_size() * _context_size()
        # With fewer sequences than ranks, a dummy of two tokens without a loss keeps this rank in step with the others.
        rows = [sequence.ids for sequence in sequences] or [torch.zeros(2, dtype=torch.long)]
        prefixes = [sequence.prompt_length for sequence in sequences] if self.shares_prompts else []
        input_ids, position_ids, packed = pack(rows, prefixes=prefixes, multiple_of=multiple, device=self.device)
        response_tokens = _response_tokens(sequences).to(self.device)  # (N,) indices into the concatenated sequences
        row_of_token = packed.spread(torch.arange(input_ids.shape[1], device=self.device))  # (T,)
        mask = torch.zeros(input_ids.shape[1], dtype=torch.bool, device=self.device)
        mask[row_of_token[response_tokens]] = True
        weight = AGGREGATIONS[self.settings.algorithm.loss_aggregation]
        weights = [weight(sequence.response_length, totals) for sequence in sequences]
        columns = torch.stack(
            [
                _per_token(weights, sequences),
                _per_token([sequence.advantage for sequence in sequences], sequences),
                torch.cat([sequence.log_probs for sequence in sequences] or [torch.empty(0)]),
            ]
        )
        fresh = None
        if self.settings.may_be_stale:
            fresh = torch.cat([sequence.fresh for sequence in sequences] or [torch.empty(0, dtype=torch.bool)])
        shard = input_ids.shape[1] // _context_size()
        start = shard * parallel_state.get_context_parallel_rank()
        predicting = row_of_token[response_tokens - 1] - start
        mine = (predicting >= 0) & (predicting < shard)
        columns = columns.to(self.device)[:, mine]
        response_lengths = _response_lengths(sequences).to(self.device)  # (S,)
        response_of_token = torch.arange(len(sequences), device=self.device).repeat_interleave(response_lengths)
        return MicroBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            packed=packed,
            response_mask=mask[None],
            predicting=predicting[mine],
            targets=input_ids[0, row_of_token[response_tokens[mine]]],
            tokens=TokenBatch(
                weights=columns[0],
                advantages=columns[1],
                rollout_log_probs=columns[2],
                responses=Responses(
                    counts=response_of_token[mine].bincount(minlength=len(sequences)),
                    lengths=response_lengths,
                    group=parallel_state.get_context_parallel_group(),
                ),
                fresh=None if fresh is None else fresh.to(self.device)[mine],
            ),
            routing=self._routing(sequences, packed) if self.settings.engine.replay_routing else None,
        )

    def _routing(self, sequences: Sequence[TrainingSequence], packed: Packed) -> Tensor:
        """The experts that this rank's rows must visit, (R / cp, layers, k); padding visits the first k."""
        config = self.model.config
        known = [sequence.routing.view(-1, config.num_layers, config.moe_router_topk) for sequence in sequences]
        padding = len(packed.positions) - sum(map(len, known))
        first = torch.arange(config.moe_router_topk, dtype=torch.int16).expand(padding, config.num_layers, -1)
        experts = torch.cat([*known, first]).to(self.device).long()
        return context_shard(packed.collect(experts), dim=0)

    def with_past_log_probs(self, batches: list[MicroBatch], old: bool) -> list[MicroBatch]:
        """Add the old log-probs if ``old``, and the reference's if there is one; called before the first step."""
        if old:
            found = self._log_probs_of(batches)
            batches = [_with(b, old_log_probs=log_probs) for b, log_probs in zip(batches, found, strict=True)]
        if self.reference is not None:
            with _weights_swapped(self.model, self.reference):
                found = self._log_probs_of(batches)
            batches = [_with(b, reference_log_probs=log_probs) for b, log_probs in zip(batches, found, strict=True)]
        return batches

    @torch.no_grad()
    def _log_probs_of(self, batches: list[MicroBatch]) -> list[Tensor]:
        return [self._forward(batch, with_entropy=False)[0] for batch in batches]

    def accumulate_gradients(self, batches: list[MicroBatch], totals: StepTotals) -> dict[str, float]:
        """Run forward and backward over this rank's packs.

        Returns:
            the loss and the weighted sums of the metrics, each over the whole step and all data-parallel ranks.
        """
        algorithm, mtp = self.settings.algorithm, self.settings.mtp
        wants_entropy = bool(algorithm.entropy_coefficient) or algorithm.entropy_metric
        # Makes the auxiliary loss a mean over packs. Context-parallel ranks already split a pack's gradient.
        packs = len(batches) * parallel_state.get_data_parallel_world_size()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / packs, device=self.device))
        found: dict[str, Tensor] = {}
        began = time.perf_counter()
        for batch in batches:
            log_probs, entropy, hidden = self._forward(batch, wants_entropy)
            loss, metrics = grpo_loss(
                log_probs, entropy, batch.tokens, algorithm, against_engine=self.settings.ratio_against_engine
            )
            metrics["loss"] = loss.detach()
            if mtp.train:
                of_mtp = mtp_loss(
                    self.model,
                    hidden,
                    batch.input_ids,
                    batch.response_mask,
                    batch.packed,
                    token_count=totals.tokens,
                    chunk=self.settings.training.log_prob_chunk,
                )
                metrics["mtp_loss"] = of_mtp.detach()
                loss = loss + mtp.loss_scale * of_mtp
            loss.backward()
            for name, value in metrics.items():
                join = torch.maximum if name in MAXIMA else torch.add
                found[name] = join(found[name], value) if name in found else value
        idle = _idle_share(began, self.device)
        of_experts = expert_metrics(take_expert_load(self.model), take_routing_agreement(self.model))
        return _over_all_ranks(found) | idle | of_experts

    def _forward(self, batch: MicroBatch, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs (N,) and entropies (N,) of the response tokens, and all hidden states (R / cp, H)."""
        ids, positions = context_shard(batch.input_ids), context_shard(batch.position_ids)
        if batch.routing is not None:
            replay_routing(self.model, batch.routing)
        hidden = hidden_states(self.model, ids, positions, batch.packed)
        # Not hidden[rows]: if samples share a row, its gradient is summed in an order that CPU threads race for.
        log_probs, entropy = token_log_probs(
            hidden.index_select(0, batch.predicting),  # (N, H)
            output_weight(self.model),
            batch.targets,
            temperature=self.settings.sampling.temperature,
            chunk=self.settings.training.log_prob_chunk,
            with_entropy=with_entropy,
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
        )
        return log_probs, entropy, hidden


def _over_all_ranks(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Reduce this rank's metrics over all data-parallel ranks: sums, except `MAXIMA`."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    together: dict[str, float] = {}
    for operation, maxima in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
        names = [name for name in metrics if (name in MAXIMA) == maxima]
        values = torch.stack([metrics[name].double() for name in names])
        if group.size() > 1:
            dist.all_reduce(values, operation, group)
        together |= dict(zip(names, values.tolist(), strict=True))
    return together


def _idle_share(began: float, device: torch.device) -> dict[str, float]:
    """The mean share of the time since ``began`` that a rank waits for the slowest; empty with a single rank."""
    if dist.get_world_size() == 1:
        return {}
    if device.type == "cuda":
        torch.cuda.synchronize()
    busy = torch.tensor([time.perf_counter() - began], dtype=torch.float64)  # on the CPU: over gloo
    everyone = [torch.empty_like(busy) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, busy)
    seconds = torch.cat(everyone)
    return {"idle_share": 1 - (seconds.mean() / seconds.max()).item()}


def _context_size() -> int:
    return parallel_state.get_context_parallel_world_size()


def _response_tokens(sequences: Sequence[TrainingSequence]) -> Tensor:
    """Indices (N,) of the response tokens in the concatenated sequences."""
    start, places = 0, [torch.empty(0, dtype=torch.long)]
    for sequence in sequences:
        end = start + len(sequence.ids)
        places.append(torch.arange(start + sequence.prompt_length, end))
        start = end
    return torch.cat(places)


def _per_token(values: list[float], sequences: Sequence[TrainingSequence]) -> Tensor:
    """Repeat each sequence's value for every token of its response: (N,)."""
    return torch.tensor(values).repeat_interleave(_response_lengths(sequences))


def _response_lengths(sequences: Sequence[TrainingSequence]) -> Tensor:
    """Tokens of each response (S,)."""
    return torch.tensor([sequence.response_length for sequence in sequences], dtype=torch.long)


def _with(batch: MicroBatch, **log_probs: Tensor) -> MicroBatch:
    return replace(batch, tokens=replace(batch.tokens, **log_probs))


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the current weights on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@contextlib.contextmanager
def _weights_swapped(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give ``model`` other ``weights`` within the context."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].to(parameter.device)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]
