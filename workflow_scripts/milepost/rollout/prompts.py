"""Convert chat messages to token ids and back, with the checkpoint's own tokenizer and chat template."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from milepost.common.errors import UserError
from milepost.common.files import read_json

ANSWER = "forty-two"  # what an assistant says where the end of its turn is looked for


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint in the Hub's format, from local files only.

    A missing tokenizer or chat template is a `UserError`.
    """
    try:
        # tokenizer_config.json names Qwen2Tokenizer, which splits words by its own pattern, without combining marks,
        # instead of tokenizer.json's, with which the model was trained.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises plain Exception for a broken file
        raise UserError(
            f"{folder}: no usable tokenizer ({_first_line(error)}): add the original's tokenizer files"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template: use a chat model's checkpoint")
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], enable_thinking: bool
) -> list[int]:
    """Token ids of a chat up to the start of the assistant's answer; ``enable_thinking`` goes to the template."""
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, enable_thinking=enable_thinking
    )
    return list(encoded["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Collection[int] = ()) -> str:
    """The text of sampled tokens, without trailing ``stops``.

    Other special tokens are kept, so that graders and readers see what the model really said.
    """
    end = len(ids)
    while end and ids[end - 1] in stops:
        end -= 1
    return tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_token_ids(folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response, in ascending order.

    They are the tokenizer's end of turn (``<|im_end|>``) and padding (``<|endoftext|>``), those that
    ``generation_config.json`` names, and what the chat template ends an assistant's turn with. If the template ends it
    with no special token, a line on stderr says so.
    """
    path = Path(folder) / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(named if isinstance(named, list) else [named])}
    turn_end = _turn_end(tokenizer)
    stops = tuple(sorted({*ids, turn_end} - {None}))
    if turn_end is None:
        ends = f"only with {' or '.join(tokenizer.convert_ids_to_tokens(stops))}" if stops else "with no token"
        print(
            f"warning: {folder}: the chat template ends an assistant's turn with no special token: responses end"
            f" {ends}, or are cut off; if the model was trained with another template, put that into the folder",
            file=sys.stderr,
        )
    return stops


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token after an assistant's words in a rendered chat; None if there is none."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError:  # it renders prompts only
        return None
    _, answered, rest = text.rpartition(ANSWER)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids = tokenizer.encode(rest, add_special_tokens=False) if answered else []
    return next((token for token in ids if token in special), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
