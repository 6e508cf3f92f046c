"""The data sets of download.py: every format and layout, and the benchmarks of config.yaml by rows of their schema."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import download as script
from hub_runs import TOKEN, Run
from hub_server import serve
from milepost.checkpoints.manifest import read_manifest
from milepost.common.errors import UserError
from milepost.configuration.layers import read_yaml
from milepost.configuration.schema import Dataset, Reward
from milepost.evaluation.problems import load_problems
from settings import CONFIG
from stages import call, job_arguments

ROWS = [
    {"question": f"What is {n} + 1?", "truth": {"answer": [str(n + 1)]}, "source": "sums" if n % 2 else "notes"}
    for n in range(6)
]
KEYS = {"prompt_key": "question", "label_key": "truth.answer", "filter": {"source": "sums"}}


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def comma_separated(rows, separator=","):
    flat = [
        {"question": row["question"], "truth.answer": row["truth"]["answer"][0], "source": row["source"]}
        for row in rows
    ]
    return delimited(flat, separator)


def delimited(rows, separator=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS = {
    "jsonl": json_lines,
    "json": lambda rows: json.dumps(rows).encode(),
    "parquet": parquet,
    "csv": comma_separated,
    "tsv": lambda rows: comma_separated(rows, "\t"),
}


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """``fetch(**settings)``: run download.py on the folder ``data``, in this process; returns its manifest."""

    def run(**settings):
        dataset = {"folder": str(tmp_path / "data"), **settings}
        manifest = tmp_path / "results/mine.json"
        given = job_arguments({"dataset": dataset}, every_row=True, labels="math")
        places = ["--name", "mine", "--folder", str(tmp_path / "results"), "--manifest", str(manifest)]
        call(monkeypatch, script.main, [*given, *places])
        return read_manifest(manifest)

    (tmp_path / "data").mkdir()
    return run


@pytest.mark.parametrize("ending", [*WRITERS, *(f"{ending}.gz" for ending in WRITERS)])
def test_every_format_is_fetched_filtered_and_read_again(tmp_path, fetch, capsys, ending):
    for part in (0, 1):
        content = WRITERS[ending.removesuffix(".gz")](ROWS[3 * part : 3 * part + 3])
        content = gzip.compress(content) if ending.endswith(".gz") else content
        (tmp_path / f"data/train-{part}.{ending}").write_bytes(content)
    (tmp_path / "data/test-0.csv").write_text("unused")
    manifest = fetch(split="train", **KEYS)
    assert sorted(manifest.files) == [f"train-0.{ending}", f"train-1.{ending}"]
    assert manifest.facts["rows"] == 3
    assert "mine: uses 3 of the 6 rows that were read" in capsys.readouterr().err
    problems = load_problems(manifest)
    assert [(p.messages[-1]["content"], p.label) for p in problems] == [
        (f"What is {n} + 1?", str(n + 1)) for n in (1, 3, 5)
    ]
    assert [p.place.split(",")[0] for p in problems] == [f"train-{part}.{ending}" for part in (0, 1, 1)]
    assert all(json.loads(json.dumps(p.row)) == p.row and p.row["source"] == "sums" for p in problems)


def test_what_is_wrong_is_said_of_the_user_s_own_file(tmp_path, fetch, capsys):
    (tmp_path / "data/a.csv").write_bytes(comma_separated(ROWS))
    (tmp_path / "data/b.jsonl").write_bytes(b"<!doctype html><html></html>")
    with pytest.raises(UserError, match=rf"^{tmp_path}/data/b\.jsonl: is a web page \(HTML\), not JSON lines: "):
        fetch(file="*", **KEYS)
    with pytest.raises(UserError, match=rf"^{tmp_path}/data: holds no file c\.csv; there: a\.csv, b\.jsonl: correct"):
        fetch(file="c.csv")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/data/a\.csv: 6 of 6 rows .* the rows have question, truth\.answer"
    ):
        fetch(file="a.csv")
    fetch(file="a.csv", system="Be brief.", **KEYS)
    assert "keep a system message" not in capsys.readouterr().err
    chats = [{"prompt": [{"role": "system", "content": "Be loud."}, {"role": "user", "content": "1?"}], "label": 1}]
    (tmp_path / "data/chats.json").write_text(json.dumps(chats))
    fetch(file="chats.json", system="Be brief.")
    assert "mine: 1 of 1 prompts keep a system message of their own" in capsys.readouterr().err


@pytest.fixture
def hub():
    with serve() as server:
        yield server


CARD = """---
configs:
- {config_name: main, default: true, data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]}
- {config_name: socratic, data_files: [{split: train, path: socratic/train-*}]}
---
"""


def test_a_subset_and_a_split_are_found_as_the_card_lists_them(tmp_path, hub):
    """Only the card and the files of the split are fetched, and an offline run finds the same ones."""
    download = Run(tmp_path, hub)
    train = {f"main/train-0000{n}-of-00002.parquet": parquet(ROWS[3 * n : 3 * n + 3]) for n in (0, 1)}
    others = {"main/test-00000-of-00001.parquet": parquet(ROWS), "socratic/train-0.parquet": parquet(ROWS)}
    hub.host("owner/sums", {"README.md": CARD.encode()} | train | others, {*train, *others}, "datasets")
    config = {"dataset": {"repo": "owner/sums", "split": "train", **KEYS}}
    for offline in ("0", "1"):
        manifest = download.succeeds(download(config, HF_HUB_OFFLINE=offline))
        assert (sorted(manifest.files), manifest.facts["rows"]) == (sorted(train), 3)
    assert not hub.asked("resolve/.*/(main/test|socratic)")
    download.manifest.unlink()
    config["dataset"] |= {"split": "dev"}
    download.fails(download(config), "dataset owner/sums: no split dev: README.md lists subset main with train, test")


MATHS = "Please reason step by step, and put your final answer within \\boxed{}."
BENCHMARKS = {
    "aime-2024": (
        "aime-2024.jsonl",
        json_lines([{"prompt": [{"role": "user", "content": f"Find ${n}$."}], "label": f"03{n}"} for n in (3, 4)]),
        [(f"Find $3$.\n\n{MATHS}", "033"), (f"Find $4$.\n\n{MATHS}", "034")],
    ),
    "aime-2025": (
        "test.jsonl",
        json_lines([{"problem": f"Find $m+{n}$.", "answer": f"{70 + n}", "id": f"{n}"} for n in (0, 1)]),
        [(f"Find $m+0$.\n\n{MATHS}", "70"), (f"Find $m+1$.\n\n{MATHS}", "71")],
    ),
    "amc-2023": (
        "test-00000-of-00001.parquet",
        parquet([{"id": n, "answer": f"{n}.0", "url": "https://a.org/", "question": f"Is it ${n}$?"} for n in (7, 8)]),
        [(f"Is it $7$?\n\n{MATHS}", "7.0"), (f"Is it $8$?\n\n{MATHS}", "8.0")],
    ),
    "math-500": (
        "test.jsonl",
        json_lines(
            [
                {
                    "problem": f"Convert the point $(0,{n})$.",
                    "solution": f"We have that the point is $\\boxed{{\\left( {n}, \\frac{{\\pi}}{{2}} \\right)}}.$",
                    "answer": f"\\left( {n}, \\frac{{\\pi}}{{2}} \\right)",
                    **{"subject": "Precalculus", "level": 2, "unique_id": f"test/precalculus/{n}.json"},
                }
                for n in (3, 4)
            ]
        ),
        [
            (f"Convert the point $(0,{n})$.\n\n{MATHS}", f"\\left( {n}, \\frac{{\\pi}}{{2}} \\right)")
            for n in (3, 4)
        ],
    ),
    "gsm8k": (
        "main/test-00000-of-00001.parquet",
        parquet([{"question": f"{n} eggs?", "answer": f"It is <<{n}*3={3 * n}>>.\n#### 1,{3 * n}"} for n in (40, 50)]),
        [(f"40 eggs?\n\n{MATHS}", "1,120"), (f"50 eggs?\n\n{MATHS}", "1,150")],
    ),
    "gpqa-diamond": (
        "gpqa_diamond.csv",
        delimited(
            [
                {
                    **{"Pre-Revision Question": "?", "Question": f"Which energy,\nin eV, is {n}?\n"},
                    **{"Correct Answer": f"{n}\n", "Incorrect Answer 1": "10^-4", "Incorrect Answer 2": " 10^-9"},
                    **{"Incorrect Answer 3": "10^-8", "Subdomain": "Physics (general)", "Record ID": f"rec{n}"},
                }
                for n in (11, 12)
            ]
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_ready_by_name(tmp_path, hub, name):
    """The entry reads rows of the true schema, of the commit that it pins, as the prompts and labels that are meant."""
    entry = read_yaml(CONFIG / "config.yaml")["datasets"][name]
    file, content, expected = BENCHMARKS[name]
    files = {file: content, "main/train-00000-of-00001.parquet": b"", "LICENSE": b""}
    hosted = hub.host(entry["repo"], files | {"README.md": CARD.encode()}, {file}, "datasets")
    hosted.refs = {entry["revision"]: hosted.refs["main"]}
    assert len(entry["revision"]) == 40 and Dataset(**entry).row_count in (30, 40, 198, 500, 1319)
    labels = Reward(**entry.get("reward", {})).labels
    download = Run(tmp_path, hub)
    download.labels = labels
    config = {"dataset": entry | {"rows": 2}}
    if name == "gpqa-diamond":
        hosted.gated, hosted.card = True, {"license": "cc-by-4.0"}
        terms = "access is gated: accept its terms (licence: cc-by-4.0) at http://"
        download.fails(download(config), terms, "/datasets/Idavidrein/gpqa with your account, and set HF_TOKEN")
    manifest = download.succeeds(download(config, every_row=True, HF_TOKEN=TOKEN))
    assert manifest.facts["revision"] == entry["revision"] and set(manifest.files) == {file}
    problems = load_problems(manifest, labels)
    if name != "gpqa-diamond":
        assert [(problem.messages[-1]["content"], problem.label) for problem in problems] == expected
        return
    for energy, problem in zip((11, 12), problems, strict=True):
        question, choices, instruction = problem.messages[-1]["content"].split("\n\n")
        assert question == f"Which energy,\nin eV, is {energy}?"
        assert instruction == "Please reason step by step, and put the letter of your choice within \\boxed{}."
        lettered = dict(line.split(") ") for line in choices.split("\n"))
        assert list(lettered) == ["A", "B", "C", "D"] and lettered[problem.label] == str(energy)
        assert sorted(lettered.values()) == sorted([str(energy), "10^-4", "10^-9", "10^-8"])


def test_another_number_of_rows_is_another_benchmark(tmp_path, hub):
    entry = read_yaml(CONFIG / "config.yaml")["datasets"]["aime-2025"]
    file, content, _ = BENCHMARKS["aime-2025"]
    hosted = hub.host(entry["repo"], {file: content}, kind="datasets")
    hosted.refs = {entry["revision"]: hosted.refs["main"]}
    download = Run(tmp_path, hub)
    download.fails(download({"dataset": entry}), "test.jsonl: 2 usable rows instead of 30")
