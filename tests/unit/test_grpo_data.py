"""Prompts: bad and long ones are skipped and counted, and epochs and seeds decide the order."""

import json

import pytest

from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import UserError
from milepost.grpo.data import Prompt, PromptCursor, load_prompts
from milepost.rollout.prompts import load_tokenizer
from milepost.tiny.tokenizer import train_tokenizer, write_tokenizer
from settings import section


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(), folder)
    return load_tokenizer(folder)


def manifest(folder, lines, **settings):
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    facts = {"rows": len(lines)}
    dataset = {"folder": "x", "file": "data.jsonl", **settings}
    return write_manifest(
        folder / "m.json", "download", folder, ["data.jsonl"], {"config": {"dataset": dataset}}, facts
    )


def row(question, label="3"):
    return json.dumps({"prompt": [{"role": "user", "content": question}], "label": label})


def test_bad_rows_and_long_prompts_are_skipped_and_counted(tmp_path, tokenizer):
    data = manifest(tmp_path, [row("1+2?"), "{broken", row("what? " * 100), row("2+1?")], max_bad_share=0.25)
    prompts, intake = load_prompts("mine", data, tokenizer, section("sampling", max_prompt_tokens=40))
    assert [(prompt.place, prompt.label) for prompt in prompts] == [("line 1", "3"), ("line 4", "3")]
    assert (intake.used, intake.bad, intake.too_long) == (2, 1, 1)
    assert tokenizer.decode(prompts[1].ids).startswith("<|im_start|>user\n2+1?")


def test_prompts_of_several_files_are_told_apart_by_their_places(tmp_path, tokenizer):
    """Each file has a first line: a run finds the prompts of its unfinished groups by their places."""
    (tmp_path / "data.jsonl").write_text(row("1+2?") + "\n")
    (tmp_path / "more.jsonl").write_text(row("2+1?") + "\n")
    provenance = {"config": {"dataset": {"folder": "x", "file": "*.jsonl"}}}
    files = ["more.jsonl", "data.jsonl"]
    data = write_manifest(tmp_path / "m.json", "download", tmp_path, files, provenance, {"rows": 2})
    prompts, _ = load_prompts("mine", data, tokenizer, section("sampling"))
    assert [prompt.place for prompt in prompts] == ["data.jsonl, line 1", "more.jsonl, line 1"]


def test_too_many_bad_rows_stop_the_run(tmp_path, tokenizer):
    data = manifest(tmp_path, [row("1+2?"), "{broken", row("2+1?")], max_bad_share=0.3)
    with pytest.raises(UserError, match=r"1 of 3 rows .*line 2"):
        load_prompts("mine", data, tokenizer, section("sampling"))


def test_a_data_set_of_long_prompts_alone_is_an_error_that_names_the_setting(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"sampling\.max_prompt_tokens 5"):
        load_prompts("mine", manifest(tmp_path, [row("1+2?")]), tokenizer, section("sampling", max_prompt_tokens=5))


def cursor(number, seed=7):
    return PromptCursor({"mine": [Prompt("mine", f"line {line}", [line], str(line)) for line in range(number)]}, seed)


def test_epochs_differ_in_order_and_seeds_do_too():
    orders = [tuple(p.place for p in c.take(50)) for c in (cursor(50), cursor(50, seed=8))]
    again = cursor(50)
    epochs = [tuple(p.place for p in again.take(50)) for _ in range(3)]
    assert len({*orders, *epochs}) == 4 and epochs[0] == orders[0]
