"""download.py of a data set: its one file, its rows as they are checked, and its snapshots."""

import json

import pytest

from hub_runs import Run
from hub_server import serve
from milepost.common.errors import UserError
from milepost.evaluation.problems import load_problems

ROWS = b"".join(
    json.dumps({"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "label": str(n + 1)}).encode() + b"\n"
    for n in range(5)
)


@pytest.fixture
def hub():
    with serve() as server:
        yield server


@pytest.fixture
def download(tmp_path, hub):
    return Run(tmp_path, hub)


def test_a_data_set_is_the_one_file_that_the_configuration_names(hub, download):
    files = {"aime.jsonl": ROWS, "other.jsonl": ROWS}
    hosted = hub.host("zhuzilin/aime", files, {"aime.jsonl"}, "datasets")
    download.manifest = download.folder / "results/data/aime.json"
    manifest = download.succeeds(download({"dataset": {"repo": "zhuzilin/aime", "file": "aime.jsonl"}}))
    assert set(manifest.files) == {"aime.jsonl"}
    assert manifest.facts == {
        "repo": "zhuzilin/aime",
        "revision": "main",
        "commit": hosted.refs["main"],
        "rows": 5,
    }
    assert (manifest.root / "aime.jsonl").read_bytes() == ROWS
    assert not hub.asked("other.jsonl")
    download.manifest.unlink()
    download.fails(download({"dataset": {"repo": "zhuzilin/aime", "file": "none.jsonl"}}), "holds no file none.jsonl")


def test_a_data_set_of_a_local_folder(tmp_path):
    download = Run(tmp_path, None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sums.jsonl").write_bytes(ROWS)
    (tmp_path / "data/notes.json").write_bytes(b"{}")
    manifest = download.succeeds(download({"dataset": {"folder": str(tmp_path / "data"), "file": "sums.jsonl"}}))
    assert set(manifest.files) == {"sums.jsonl"}
    assert (manifest.facts["folder"], manifest.facts["rows"]) == (str(tmp_path / "data"), 5)
    download.manifest.unlink()
    config = {"folder": str(tmp_path / "data"), "file": "sums.jsonl", "rows": 30}
    download.fails(download({"dataset": config}), "5 usable rows instead of 30")


def asking(question: str, label: object) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "label": label}


def test_rows_that_can_earn_no_reward_are_reported_at_once(tmp_path):
    r"""Labels that no answer matches are skipped and reported by kind, or end the step; so do prompts without a box."""
    download, file = Run(tmp_path, None), tmp_path / "set.jsonl"
    rows = [asking("What is 1 + 2?", "1 + 2\n#### 3"), asking("2 + 2? Use \\boxed{}.", 4.0)]
    rows += [asking("3 + 2?", "We add them. That makes 5."), asking("4 + 2?", "\\boxed{6} or \\boxed{7}")]
    rows += [asking("5 + 2?", "It is 7.")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"folder": str(tmp_path), "file": "set.jsonl"}
    download.fails(
        download({"dataset": config}),
        "set.jsonl: 3 of 5 rows are unusable: 'label' is prose",
        "(2 rows, the first in line 3)",
        "several answers (line 4)",
    )
    few_are_borne = {"dataset": config | {"max_bad_share": 0.6}}
    download.fails(download(few_are_borne, every_row=True), "3 of 5 rows are unusable")
    done = download(few_are_borne)
    manifest = download.succeeds(done)
    assert manifest.facts["rows"] == 2
    told = [line for line in done.stderr.splitlines() if "set.jsonl: skipped: " in line]
    assert len(told) == 2 and "(2 rows, the first in line 3)" in told[0] and "(line 4)" in told[1]
    assert "warning: tiny: 1 of 2 prompts ask for no \\boxed answer" in done.stderr
    assert "it has no instruction" in done.stderr
    for instruction, word in (("Put it in \\boxed{}.", "is added to them"), ("Be brief.", "does not either")):
        download.manifest.unlink()
        done = download({"dataset": config | {"max_bad_share": 0.6, "instruction": instruction}})
        download.succeeds(done)
        (line,) = [line for line in done.stderr.splitlines() if "1 of 2 prompts ask for no" in line]
        assert word in line and line.startswith("warning: ") == (word != "is added to them")


def test_a_data_set_that_is_edited_in_place_changes_no_snapshot_of_it(tmp_path):
    download = Run(tmp_path, None)
    file = tmp_path / "sums.jsonl"
    file.write_bytes(ROWS)
    config = {"dataset": {"folder": str(tmp_path), "file": "sums.jsonl"}}
    first = download.succeeds(download(config))
    with file.open("r+b") as rows:  # as long as before
        rows.write(ROWS.replace(b"What", b"Whom"))
    assert len(load_problems(first)) == 5
    assert download.succeeds(download(config)).root != first.root
    (first.root / "sums.jsonl").write_bytes(ROWS.replace(b"What", b"Whom"))
    with pytest.raises(UserError, match=r"sums\.jsonl: its sha256 is not the one"):
        load_problems(first)
