"""Supervised warm-up: a tiny model that can add, but mostly estimates.

The model imitates two ways to answer: computing the sum, or estimating it, which starts with another token, is easier
and is wrong. At first all examples are computed, so that the model learns to add; at the end most are estimates. The
model is then able but unreliable, and GRPO has to find out which way is rewarded.
"""

import functools
import math
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from milepost.configuration.schema import TinyModel
from milepost.tiny.problems import all_additions, computed, estimated
from milepost.tiny.tokenizer import CHAT_TEMPLATE, TURN_END

CHUNK = 13  # tokens per chunk of the delta rule, each a sequential step; 64 would be 3 times slower here
LEARNING_STEPS = 0.75  # share of the steps that teach adding; the rest set how often the model does it
RISING_STEPS = 0.1  # share of the steps in which the learning rate warms up
IGNORED = -100  # label of tokens that are not trained on


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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rise_and_fall((step + 1) / settings.steps))
    model.train()
    with tqdm(total=settings.steps, desc="warm-up", unit="step", mininterval=1) as progress:
        for token_ids, labels in _batches(tokenizer, tiny):  # (B, T) each
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


def _rise_and_fall(done: float) -> float:
    """The learning rate's factor after a share ``done`` of the steps: linear warm-up, then cosine decay."""
    if done < RISING_STEPS:
        return done / RISING_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (done - RISING_STEPS) / (1 - RISING_STEPS))


def _batches(tokenizer: Tokenizer, tiny: TinyModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Every step's token ids and labels, (B, T) each, right-padded, so that causal layers need no mask."""
    settings = tiny.warm_up
    generator = random.Random(tiny.seed)
    additions = all_additions("train")
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    for step in range(settings.steps):
        computed_share = 1.0 if step < LEARNING_STEPS * settings.steps else settings.computed_share
        rows = []
        for addition in generator.choices(additions, k=settings.batch_size):
            messages = [{"role": "user", "content": addition.question}]
            prompt = chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            answer = computed(addition) if generator.random() < computed_share else estimated(addition)
            rows.append((prompt, tokenizer.encode(answer + TURN_END).ids))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        token_ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full_like(token_ids, IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            token_ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield token_ids, labels
