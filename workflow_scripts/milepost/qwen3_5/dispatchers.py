"""Token dispatchers for expert parallelism, for the cases that Megatron-Core's do not cover.

``flex`` without DeepEP: Megatron-Core's flex dispatcher wraps DeepEP's kernels. `FlexDispatcher` does the same with
plain collectives: it sends a token once to every rank that holds any of its experts, instead of once per expert
(``alltoall``) or to every rank (``allgather``). That rank copies the token for its experts and sums their outputs
before sending the result back. With 8 of 256 experts over 8 ranks, 5.3 copies of a token are sent instead of 8.

``allgather`` with packs: Megatron-Core's needs equally many tokens on every rank; `AllGatherDispatcher` pads them.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoETokenDispatcher
from torch import Tensor

from milepost.qwen3_5.copies import copy_rows, find_copies, sum_copies


class FlexDispatcher(MoETokenDispatcher):
    """Dispatch over all expert x expert-tensor parallel ranks."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Copy every token for each rank it visits: (S, 1, hidden), (S, experts) -> (sent, hidden), (sent, E).

        Of the receiving rank's E experts, those that the token did not choose get probability -1.
        """
        self.shape = tokens.shape
        # Expert-tensor ranks hold shards of the same experts, so each of them receives the same tokens.
        chosen = self._by_rank(routing_map)  # (S, ranks, E)
        visits = chosen.any(-1)  # (S, ranks)
        # Exchange how many tokens go to each rank and how many copies it makes of them. This is the layer's only GPU
        # sync: with the sizes known on the host, nothing else has to wait.
        there = torch.stack([visits.sum(0), chosen.sum((0, 2))], dim=1)  # (ranks, 2)
        here = torch.empty_like(there)
        dist.all_to_all_single(here, there, group=self.tp_ep_group)
        (self.sent, _), (self.received, copies) = torch.stack([there, here]).transpose(1, 2).tolist()
        self.visitor_count = sum(copies)
        number, ranks, local = chosen.shape
        most = min(ranks, self.config.moe_router_topk * self.tp_size)
        rank, self.travellers = find_copies(visits, sum(self.sent), most)
        weights = self._by_rank(probs).masked_fill(~chosen, -1).view(number * ranks, local)
        places = self.travellers.owners * ranks + rank
        return copy_rows(tokens.reshape(number, -1), self.travellers), weights.index_select(0, places)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange: (sent, hidden), (sent, E) -> (received, hidden), (received, E)."""
        return self._exchange(hidden_states), self._exchange(probs)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copy every token for its experts on this rank: rows (n, hidden) sorted by expert, tokens per expert (E,),
        and probabilities (n,).
        """
        wanted, local = ~(probs < 0), self.num_local_experts  # (received, E); NaN counts as chosen
        expert, self.visitors = find_copies(wanted, self.visitor_count, min(local, self.config.moe_router_topk))
        chosen = probs.flatten().index_select(0, self.visitors.owners * local + expert)
        return copy_rows(hidden_states, self.visitors), wanted.sum(0), chosen

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the outputs of a token's experts on this rank: (n, hidden) -> (received, hidden)."""
        return sum_copies(hidden_states, self.visitors)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Exchange back: (received, hidden) -> (sent, hidden)."""
        return all_to_all(self.tp_ep_group, hidden_states, self.sent, self.received)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum a token's results from all ranks: (sent, hidden) -> (S, 1, hidden)."""
        return sum_copies(hidden_states, self.travellers).view(self.shape)

    def _by_rank(self, values: Tensor) -> Tensor:
        """(S, experts) -> (S, ranks, E), ranks in the order of the group: expert-tensor rank fastest."""
        by_rank = values.reshape(len(values), self.ep_size, 1, self.num_local_experts)
        return by_rank.expand(-1, -1, self.tp_size, -1).flatten(1, 2)

    def _exchange(self, rows: Tensor) -> Tensor:
        return all_to_all(self.tp_ep_group, rows, self.received, self.sent)


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Megatron-Core's dispatcher, with rows that visit no expert added until all ranks have equally many."""

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """(S, 1, hidden) and (S, experts) -> (longest S, hidden) and (longest S, experts)."""
        self.tokens = len(hidden_states)
        longest = torch.tensor(self.tokens, device=hidden_states.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.tp_ep_group)
        missing = int(longest) - self.tokens
        return super().dispatch_preprocess(
            F.pad(hidden_states, (0, 0, 0, 0, 0, missing)),
            F.pad(routing_map, (0, 0, 0, missing)),
            F.pad(probs, (0, 0, 0, missing)),
        )

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """(longest S, hidden) -> (S, 1, hidden)."""
        return super().combine_postprocess(hidden_states)[: self.tokens]
