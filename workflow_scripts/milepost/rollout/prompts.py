"""Convert chat messages to token ids and back, with the checkpoint's own tokenizer and chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from milepost.common.errors import UserError
from milepost.common.files import read_json


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint in the Hub's format, from local files only.

    A missing tokenizer or chat template is a `UserError`.
    """
    try:
        # tokenizer_config.json names Qwen2Tokenizer, which splits words by its own pattern, without combining marks,
        # instead of tokenizer.json's, with which the model was trained.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises plain Exception for a broken file
        raise UserError(f"{folder}: no usable tokenizer ({_first_line(error)}): download the model again") from None
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


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of sampled tokens, without trailing end-of-turn and end-of-text tokens.

    Other special tokens are kept, so that graders and readers see what the model really said.
    """
    end = len(ids)
    while end and ids[end - 1] in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        end -= 1
    return tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_token_ids(folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response, in ascending order.

    They are the tokenizer's end of turn (``<|im_end|>``) and padding (``<|endoftext|>``), and any others that
    ``generation_config.json`` names.
    """
    path = Path(folder) / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(named if isinstance(named, list) else [named])}
    return tuple(sorted(ids - {None}))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
