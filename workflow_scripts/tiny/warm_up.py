"""The supervised start: a tiny model that knows how to add, but slips more often than not.

It imitates worked answers of which only a share is right; the others hold one slip, of one in the units or of ten in
the tens, and follow from it. So the model learns the sums and the format for certain, and is torn only between
answers of which one is right: what GRPO has to find out from the reward.
"""

import functools
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from configuration.schema import TinyModel
from tiny.problems import Addition, all_additions, response
from tiny.tokenizer import CHAT_TEMPLATE, TURN_END

CHUNK = 16  # tokens that the delta rule takes at a time: each is a sequential step, and these texts are short
IGNORED = -100  # label of a token that is not trained on


def warm_up(model: PreTrainedModel, tokenizer: Tokenizer, tiny: TinyModel) -> None:
    """Train ``model`` in place with AdamW on the responses; the same seed gives the same weights."""
    settings = tiny.warm_up
    if not settings.steps:
        return
    torch.manual_seed(tiny.seed)
    text_model = model.model.language_model
    for layer in text_model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.chunk_gated_delta_rule = functools.partial(torch_chunk_gated_delta_rule, chunk_size=CHUNK)
    parameters = [*text_model.parameters(), *({model.lm_head.weight} - set(text_model.parameters()))]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    batches = _batches(tokenizer, tiny)
    model.train()
    with tqdm(total=settings.steps, desc="warm-up", unit="step", mininterval=1) as progress:
        for _ in range(settings.steps):
            token_ids, labels = next(batches)  # (B, T) each
            hidden = text_model(input_ids=token_ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, H)
            targets = labels[:, 1:]
            trained = targets != IGNORED
            loss = F.cross_entropy(model.lm_head(hidden[trained]), targets[trained])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()


def _batches(tokenizer: Tokenizer, tiny: TinyModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end of token ids and labels, (B, T) each, right-padded: causal layers need no mask for that."""
    generator = random.Random(tiny.seed)
    additions = all_additions("train")
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    prompts = [
        chat.apply_chat_template(
            addition.row("prompt", "label")["prompt"], add_generation_prompt=True, return_dict=False
        )
        for addition in additions
    ]
    while True:
        rows = []
        for index in generator.choices(range(len(additions)), k=tiny.warm_up.batch_size):
            answer = worked_answer(additions[index], generator, tiny.warm_up.correct_share)
            rows.append((prompts[index], tokenizer.encode(answer + TURN_END).ids))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        token_ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full_like(token_ids, IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            token_ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield token_ids, labels


def worked_answer(addition: Addition, generator: random.Random, correct_share: float) -> str:
    """A response to ``addition``: right with probability ``correct_share``, otherwise with one slip."""
    units, tens = addition.partial_sums
    if generator.random() < correct_share:
        return response(units, tens)
    slips = [(units + 1, tens), (units, tens + 10), (units, tens - 10)]
    if units > 0:
        slips.append((units - 1, tens))
    return response(*generator.choice(slips))
