"""How long a training prompt may be."""

import json

from milepost.checkpoints.manifest import write_manifest
from milepost.grpo.data import load_prompts
from milepost.rollout.prompts import encode_prompt, load_tokenizer
from milepost.tiny.tokenizer import train_tokenizer, write_tokenizer
from settings import section


def test_a_prompt_may_have_just_as_many_tokens_as_are_allowed(tmp_path):
    write_tokenizer(train_tokenizer(), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    chats = [[{"role": "user", "content": f"What is {number} + 1?"}] for number in (1, 12345)]
    lines = [json.dumps({"prompt": chat, "label": "2"}) for chat in chats]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    dataset = {"config": {"dataset": {"folder": "x", "file": "rows.jsonl"}}}
    data = write_manifest(tmp_path / "m.json", "download", tmp_path, ["rows.jsonl"], dataset, {"file": "rows.jsonl"})
    short, long = (len(encode_prompt(tokenizer, chat, True)) for chat in chats)
    for allowed, used in ((long, 2), (long - 1, 1), (short, 1)):
        prompts, intake = load_prompts("mine", data, tokenizer, section("sampling", max_prompt_tokens=allowed))
        assert (len(prompts), intake.used, intake.too_long) == (used, used, 2 - used)
