"""Chats to token ids and sampled ids to text, with a tokenizer in Qwen3.5's format."""

import pytest

from milepost.common.errors import UserError
from milepost.common.files import write_json
from milepost.rollout.prompts import decode, encode_prompt, load_tokenizer, stop_token_ids
from milepost.tiny.tokenizer import train_tokenizer, write_tokenizer

MESSAGES = [{"role": "user", "content": "What is 12 + 34?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    ids = encode_prompt(tokenizer, MESSAGES, enable_thinking=True)
    assert all(type(token) is int for token in ids)
    assert decode(tokenizer, ids) == ("<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_enable_thinking_reaches_the_template(tokenizer):
    text = decode(tokenizer, encode_prompt(tokenizer, MESSAGES, enable_thinking=False))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_only_the_closing_tokens_are_left_out_of_a_text(tokenizer):
    stops = end, padding = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    ids = tokenizer.encode("<think>12<|im_start|></think>  \\boxed{46} .")
    assert decode(tokenizer, [*ids, end], stops) == "<think>12<|im_start|></think>  \\boxed{46} ."
    assert decode(tokenizer, [*ids, padding, end], stops) == decode(tokenizer, ids, stops)
    assert decode(tokenizer, [*ids, end, *ids], stops).count("<|im_end|>") == 1
    assert decode(tokenizer, [end], stops) == ""
    assert decode(tokenizer, [*ids, end]).endswith("<|im_end|>")


def test_responses_stop_at_what_tokenizer_generation_config_and_chat_template_name(tmp_path, folder, capfd):
    tokenizer = load_tokenizer(folder)
    end, padding, more = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted([end, padding]))
    for named in ([end, more], more):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": named})
        assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted([end, padding, more]))
    write_json(tmp_path / "generation_config.json", {"temperature": 1.0})
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted([end, padding]))
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it: only the template knows the end of a turn
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted([end, padding]))
    assert not capfd.readouterr().err


ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
PROMPTS_ONLY = "{{ messages[-1].content if messages[-1].role == 'user' else raise_exception('no answers') }}<|im_end|>"


@pytest.mark.parametrize("template", [ENDLESS, PROMPTS_ONLY])
def test_a_template_whose_turn_never_ends_is_said(tmp_path, folder, capfd, template):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template, tokenizer.eos_token = template, "<|endoftext|>"
    assert stop_token_ids(tmp_path, tokenizer) == (tokenizer.pad_token_id,)
    (line,) = capfd.readouterr().err.splitlines()
    assert "ends an assistant's turn with no special token: responses end only with <|endoftext|>, or are cut" in line


def test_tokenizer_without_a_chat_template_is_refused(tmp_path):
    write_tokenizer(train_tokenizer(), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_missing_or_broken_tokenizer_is_refused_in_one_line(tmp_path, folder, content):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
