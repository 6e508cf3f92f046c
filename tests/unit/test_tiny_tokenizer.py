"""The generated tokenizer: lossless for any text, short for the demo's chats, and the same in Transformers."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.common.files import write_json
from milepost.rollout.prompts import load_tokenizer
from milepost.tiny.problems import Addition, all_additions, computed, estimated
from milepost.tiny.tokenizer import CONTROL_TOKENS, THINK_TOKENS, TURN_END, VOCABULARY, train_tokenizer, write_tokenizer

TOKENIZER = train_tokenizer()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The tokenizer as the pipeline loads it: from a folder whose config.json says that the model is a Qwen3.5."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(TOKENIZER, folder)
    write_json(folder / "config.json", {"model_type": "qwen3_5"})
    return load_tokenizer(folder)


@settings(deadline=None)  # the machine may be busy
@given(st.text())
def test_any_text_survives(text):
    decoded = TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False)
    assert decoded == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text", ["What is 37 + 58?", "Ünïcödé 数学 हिन्दी x\u0304 v\u20d7 😀\t\n  x^2\r\n", "a<think>b</think>\n\n"]
)
def test_what_is_loaded_splits_as_tokenizer_json_says(loaded, text):
    assert loaded(text).input_ids == TOKENIZER.encode(text).ids


def test_every_token_has_a_row_of_the_embedding_and_training_repeats():
    assert TOKENIZER.get_vocab_size() <= VOCABULARY
    assert train_tokenizer().to_str() == TOKENIZER.to_str()


def test_digits_and_special_tokens_are_single(loaded):
    assert loaded.tokenize("1234567") == list("1234567")
    for token in (*CONTROL_TOKENS, *THINK_TOKENS):
        assert len(loaded(token).input_ids) == 1
    assert loaded.eos_token == TURN_END and loaded.pad_token == "<|endoftext|>"


def test_skipping_special_tokens_keeps_the_think_block_that_the_reward_looks_for(loaded):
    ids = loaded("8+7\n</think>\n\nAnswer: 15<|im_end|>").input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == "8+7\n</think>\n\nAnswer: 15"


def test_the_template_opens_a_think_block_unless_told_not_to(loaded):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    start = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"

    def rendered(**switch):
        return loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)

    assert rendered() == rendered(enable_thinking=True) == start + "<think>\n"
    assert rendered(enable_thinking=False) == start + "<think>\n\n</think>\n\n"


def test_prompts_and_responses_stay_within_the_demo_s_lengths(loaded):
    longest = Addition(99, 99)
    prompt = loaded.apply_chat_template(
        longest.row("prompt", "label")["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert len(prompt) <= 24
    for addition in all_additions("evaluation"):
        for response in (computed(addition), estimated(addition)):
            assert len(loaded(response + TURN_END).input_ids) <= 24
