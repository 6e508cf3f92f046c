"""The same rows are read from every format, and a file that is something else is called by its name."""

import csv
import gzip
import io
import json
import zipfile
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milepost.common.errors import UserError
from milepost.configuration.schema import Dataset
from milepost.problems.formats import BATCH, read_rows
from milepost.problems.loading import load_problem_set

ROWS = [
    {"question": 'What is 1 + 1?\nThink, "then" answer.', "answer": "2", "level": "4"},
    {"question": "¿Qué es 30 + 3?", "answer": "033", "level": "5"},
]


def delimited(separator):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, file)
    return file.getvalue()


CONTENTS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "rows.ndjson": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "marked.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, ensure_ascii=False).encode(),
    "rows.parquet": parquet(ROWS),
    "rows.csv": delimited(","),
    "marked.csv": b"\xef\xbb\xbf" + delimited(","),
    "rows.tsv": delimited("\t"),
}
CONTENTS |= {f"{name}.gz": gzip.compress(content) for name, content in CONTENTS.items()}
CONTENTS |= {"ROWS.CSV.GZ": CONTENTS["rows.csv.gz"]}


def rows_of(path):
    return [row.values for row in read_rows(path)]


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    """Text stays text, also where it looks like a number."""
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert rows_of(tmp_path / name) == ROWS


def test_values_of_parquet_are_those_of_json(tmp_path):
    """Rows travel as JSON to reward workers and into digests; pandas' own types would not."""
    frame = pd.DataFrame(
        {
            "whole": np.array([3, 4], dtype=np.int64),
            "real": [0.5, np.nan],
            "kind": pd.Categorical(["a", "b"]),
            "when": [datetime(2025, 2, 6, 12), None],
            "vector": [np.array([1.5, 2.5]), np.array([], dtype=float)],
        }
    )
    table = pa.Table.from_pandas(frame)
    table = table.append_column("day", pa.array([date(2025, 2, 6), None]))
    table = table.append_column("price", pa.array([Decimal("1.10"), Decimal("2.00")]))
    table = table.append_column("image", pa.array([b"\xff\x00", b"text"]))
    table = table.append_column("map", pa.array([[("x", 1)], []], pa.map_(pa.string(), pa.int32())))
    table = table.append_column("nested", pa.array([{"truth": ["7"], "score": float("nan")}, None]))
    (tmp_path / "rows.parquet").write_bytes(parquet(table))
    first, second = rows_of(tmp_path / "rows.parquet")
    assert json.loads(json.dumps([first, second], allow_nan=False)) == [first, second]
    assert first == {
        **{"whole": 3, "real": 0.5, "kind": "a", "when": "2025-02-06T12:00:00", "vector": [1.5, 2.5]},
        **{"day": "2025-02-06", "price": "1.10", "image": "/wA=", "map": {"x": 1}},
        "nested": {"truth": ["7"], "score": None},
    }
    assert (second["real"], second["when"], second["image"], second["nested"]) == (None, None, "text", None)


def test_an_infinite_number_of_parquet_spoils_its_row_alone(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(parquet([{"x": 1.0}, {"x": float("inf")}, {"x": 2.0}]))
    assert [row.fault for row in read_rows(tmp_path / "rows.parquet")] == [
        None,
        "an infinite number, which JSON does not have",
        None,
    ]


@pytest.mark.parametrize("name", ["many.parquet", "many.csv", "many.jsonl"])
def test_a_part_of_a_file_costs_no_more_than_the_part(tmp_path, name):
    """What follows the part is not read: here it is damaged."""
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(5 * BATCH)]
    if name == "many.parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=BATCH, compression="none")
        content = file.getvalue()
        place = content.index(f"What is {4 * BATCH + 9} + 1?".encode()) - 400  # in the header of a page
        content = content[:place] + b"\xff" * 800 + content[place + 800 :]
    elif name == "many.csv":
        content = ("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows)).encode()
        content += b'"never closed" x,1\n'
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode() + b"{"
    (tmp_path / name).write_bytes(content)
    known = Dataset(folder="x", file=name, prompt_key="question", label_key="answer", max_bad_share=0.0)
    part = known.model_copy(update={"rows": "10:2000"})
    found = load_problem_set(tmp_path, [name], part)
    assert [problem.label for problem in found.problems] == [str(n + 1) for n in range(10, 2000)]
    with pytest.raises(UserError, match=r"damaged parquet file|line 5122: |1 of 5121 rows are unusable"):
        load_problem_set(tmp_path, [name], known)


def stream_of_arrow():
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [1]}))
    return sink.getvalue()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("rows.jsonl", "{}")
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>rows.jsonl</title></head></html>"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", CONTENTS["rows.parquet"], "is parquet, not JSON lines: name it with .parquet at the end"),
        ("rows.jsonl", CONTENTS["rows.jsonl.gz"], "is compressed with gzip, not JSON lines: name it with .gz"),
        ("rows.jsonl", CONTENTS["rows.json"], "is a JSON array, not JSON lines: name it with .json at the end"),
        ("rows.json", b'{"version": 1,\n "data": []}', "is a single JSON object (version, data), neither an array"),
        ("rows.jsonl.gz", CONTENTS["rows.jsonl"], "is text, not compressed with gzip: name it after its format"),
        ("rows.csv.gz", gzip.compress(CONTENTS["rows.parquet"]), "is parquet, not CSV"),
        ("rows.parquet", CONTENTS["rows.jsonl"], "is text, not parquet: name it after its format (.jsonl, "),
        ("rows.parquet", POINTER, "is a Git LFS pointer instead of the file, not parquet: fetch the file itself with"),
        ("rows.jsonl", PAGE, "is a web page (HTML), not JSON lines: download the file itself; on the Hub its address"),
        ("rows.csv", archive(), "is a ZIP archive, not CSV: unpack it"),
        ("rows.jsonl", stream_of_arrow(), "is an Arrow file, not JSON lines: save it as parquet"),
        ("rows.json", b"\x80\x04\x95\x00", "is a pickle, which is never loaded, not JSON: save it as parquet"),
        ("rows.csv", "question,answer".encode("utf-16"), "is text in UTF-16, not CSV: save it as UTF-8"),
        ("rows.csv", b"", "is empty, not CSV: fetch or write it again"),
        ("rows.tsv", b"\x01\x02\x00\x03", "is binary data of an unknown kind, not TSV"),
        ("rows.txt", b"{}", "its name does not say its format; name it with one of .jsonl, .ndjson, .json, .parquet"),
        ("rows", CONTENTS["rows.parquet"], "its name does not say its format; it is parquet; name it with one of"),
        ("rows.arrow", stream_of_arrow(), "its name does not say its format; it is an Arrow file; save it as parquet"),
        ("rows.parquet", CONTENTS["rows.parquet"][:-8], "damaged parquet file ("),
        ("rows.jsonl.gz", CONTENTS["rows.jsonl.gz"][:-9], "damaged gzip file ("),
        ("rows.json", b'[{"a": 1}\n {"b": 2}]', "row 1, line 2: not JSON: ',' or ']' is missing: correct the file"),
        ("rows.json", b'[{"a": 1},\n {"b": }]', "row 2, line 2: not JSON: Expecting value: correct the file"),
        ("rows.csv", b'a,b\n1,"x" y\n', "line 2: ',' expected after '\"': put cells with quotes or line breaks in"),
        ("rows.csv", b"a,a\n1,2\n", "line 1: two columns have the same name: rename one of them"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {said}")


def test_a_row_that_can_not_be_read_is_named_by_its_place(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'q,a\n"two\nlines",1\nx\n\ny,\xff\nz,3\n')
    assert [(row.number, row.fault) for row in read_rows(tmp_path / "rows.csv")] == [
        (2, None),
        (4, "not as many cells as the 2 of the header"),
        (6, "not UTF-8"),
        (7, None),
    ]
    (tmp_path / "rows.json").write_bytes(b'[{"a": 1}, {"a": 1, "a": 2}, [], {"x": NaN}]')
    assert [(row.number, row.values, row.fault) for row in read_rows(tmp_path / "rows.json")] == [
        (1, {"a": 1}, None),
        (2, None, "a key is repeated"),
        (3, [], None),
        (4, None, "not JSON: NaN"),
    ]
