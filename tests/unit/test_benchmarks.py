"""Every figure on a page is a line that a script recorded."""

import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
FIELDS = {"name", "model", "gpus", "hardware", "value", "unit", "command", "versions", "date", "note"}


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tables

    yield tables
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_line_says_which_script_measured_what_on_what(file):
    for line in map(json.loads, file.read_text().splitlines()):
        assert set(line) == FIELDS and line["hardware"] and line["versions"]["torch"]
        scripts = [word for word in shlex.split(line["command"]) if word.startswith("benchmarks/")]
        assert scripts and (ROOT / scripts[0]).is_file(), line["command"]
        assert isinstance(line["value"], float), line["name"]


def test_the_pages_show_what_was_recorded(tables):
    for page in tables.PAGES:
        text = page.read_text()
        assert "<!-- table: " in text and text == tables.filled(text), f"{page.name}: run `make benchmark-tables`"


def test_a_table_follows_its_lines(tables, monkeypatch):
    page = tables.PAGES[1].read_text()
    recorded = tables.lines

    def faster(file):
        return [line | {"value": 2 * line["value"]} for line in recorded(file)]

    monkeypatch.setattr(tables, "lines", faster)
    assert tables.filled(page) != page
