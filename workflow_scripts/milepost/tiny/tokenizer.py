"""A byte-level BPE tokenizer in Qwen3.5's format that encodes any text, and the demo's chats in few tokens.

Its alphabet is the 256 bytes. Merges are learned from the problems' chats, so that each of their words is one token;
digits stay single tokens, as in Qwen's own tokenizer.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from milepost.common.files import atomic_write, write_json
from milepost.tiny.problems import all_additions, computed, estimated

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
THINK_TOKENS = ("<think>", "</think>")  # single tokens, but not special: decoding keeps them
VOCABULARY = 512  # rows of the embedding; as in the real models, the last ones are unused

# The pattern of Qwen3.5's own tokenizer.json.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# With thinking (the default) the assistant's turn starts inside a think block, without it after an empty one.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


def train_tokenizer() -> Tokenizer:
    """Learn the merges from the training problems' chats; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chat(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK_TOKENS])
    return tokenizer


def _chat() -> list[str]:
    """The texts to learn merges from, split at the added tokens, which no merge may cross."""
    additions = all_additions("train")
    answers = [answer(addition) for answer in (computed, estimated) for addition in additions]
    texts = [part for answer in answers for part in answer.split("</think>")]
    return ["system\n", "user\n", "assistant\n", *texts, *(addition.question for addition in additions)]


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of ``text``, which must be a single token."""
    found = tokenizer.token_to_id(text)
    if found is None:
        raise ValueError(f"{text!r} is not one token")
    return found


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as a Qwen3.5 repository has them."""
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    atomic_write(folder / "chat_template.jinja", CHAT_TEMPLATE)
    added = json.loads(tokenizer.to_str())["added_tokens"]
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added
            },
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "errors": "replace",
            "image_token": "<|image_pad|>",
            "model_max_length": 4096,
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
