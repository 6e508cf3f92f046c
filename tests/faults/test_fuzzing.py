"""Whatever a file contains, it is accepted or refused with a one-line error."""

import gzip
import json
import re
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.configuration.loading import load
from milepost.configuration.schema import Dataset
from milepost.problems.loading import read_problems

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"prompt": JSON, "label": JSON}).map(lambda row: json.dumps(row).encode()),
)
HEADERS = st.one_of(
    st.binary(max_size=100),
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.one_of(
            JSON,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["BF16", "F32", "F64", "X"]) | JSON,
                    "shape": st.lists(st.integers(-2, 5), max_size=3) | JSON,
                    "data_offsets": st.lists(st.integers(-8, 64), min_size=2, max_size=2) | JSON,
                }
            ),
        ),
        max_size=3,
    ).map(lambda header: json.dumps(header).encode()),
)
INDEX = st.none() | JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), JSON, max_size=3)})


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(ROWS, max_size=6))
def test_every_row_of_a_data_set_is_a_problem_or_has_a_reason_why_not(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        found = read_problems(path.parent, [path.name], Dataset(folder="x", file=path.name))
    except UserError as error:  # the whole file is something else
        assert re.match(rf"{re.escape(str(path))}: is (a|an|binary|text|empty|parquet|compressed)", str(error))
        assert "\n" not in str(error)
        return
    there = [f"line {number}" for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    assert sorted([f"line {p.line}" for p in found.problems] + [row.place for row in found.bad]) == sorted(there)
    assert all(row.reason and "\n" not in row.reason for row in found.bad)


def written(suffix):
    """Three rows as the formats write them, gzipped where the suffix says so."""
    rows = [{"prompt": f"What is {n} + 1?", "label": str(n + 1), "more": {"x": [1.5, None]}} for n in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    plain = suffix.removesuffix(".gz")
    if plain == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    else:
        table = b'prompt,label\n"What is\n1?",2\nb,3\n'
        content = {"jsonl": lines, "json": json.dumps(rows).encode(), "csv": table}[plain]
    return gzip.compress(content) if suffix.endswith(".gz") else content


WRITTEN = {suffix: written(suffix) for suffix in ("jsonl", "json", "csv", "parquet", "jsonl.gz", "parquet.gz")}


@settings(max_examples=150, deadline=None)
@given(suffix=st.sampled_from([*WRITTEN]), place=st.floats(0, 1), junk=st.binary(max_size=12), cut=st.integers(0, 12))
def test_a_damaged_file_of_any_format_is_read_or_refused_in_one_line(tmp_path_factory, suffix, place, junk, cut):
    path, content = tmp_path_factory.getbasetemp() / f"rows.{suffix}", WRITTEN[suffix]
    start = int(place * len(content))
    path.write_bytes(content[:start] + junk + content[start + cut :])
    try:
        found = read_problems(path.parent, [path.name], Dataset(folder="x", file=path.name))
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert all(row.reason and "\n" not in row.reason for row in found.bad)
        json.dumps([problem.row for problem in found.problems], allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(header=HEADERS, data=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1), index=INDEX)
def test_a_checkpoint_is_read_or_refused_in_one_line(tmp_path_factory, header, data, length, index):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        checkpoint = HubCheckpoint(folder)
        for name in checkpoint:
            checkpoint.read(name)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)


KEYS = st.sampled_from(["models", "run", "datasets", "training", "parallel", "per_model", "9B", "rollouts", "tensor"])
SETTINGS = st.recursive(
    JSON,
    lambda inner: st.dictionaries(KEYS | st.text(string.ascii_letters, max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(overrides=st.dictionaries(KEYS, SETTINGS, max_size=3))
def test_settings_are_taken_or_refused_in_one_line(root, overrides):
    try:
        load(root / "config/config.yaml", root / "config/models", overrides)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_configuration_file_that_is_not_yaml_is_named(root, tmp_path):
    broken = tmp_path / "config.yaml"
    for content in ("models: [", "\t: x", "- 1", "models: {a: &x [*x]}"):
        broken.write_text(content)
        with pytest.raises(UserError, match=r"config\.yaml"):
            load(broken, root / "config/models", {})
