"""Read the rows of one file, whatever its format, as plain JSON values.

JSON lines, CSV and parquet are read in pieces, so that a slice of a large file costs no more than the slice; a JSON
array is read whole. A format is one function of an open binary file, named in `READERS`.
"""

import base64
import codecs
import contextlib
import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from milepost.common.errors import UserError, few
from milepost.problems.file_kinds import FORMATS, GZIP, HEAD, PARQUET, require_kind, require_suffix, suffix_of

BATCH = 1024  # rows of parquet at a time
SPACE = re.compile(r"\s*+")
NOT_UTF_8 = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as `surrogateescape` reads them


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        number: its place, from 1: the line where it begins in JSON lines and CSV, the row in other formats.
        values: what it holds; None where it can't be read.
        fault: why it can't be read.
    """

    number: int
    values: Any
    fault: str | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a file, in order; blank lines are none.

    The suffix decides the format, and the first bytes have to agree. Values are those of JSON, also from parquet: times
    become ISO text, decimals text, bytes text or else base64, and NaN None. Cells of CSV stay text.

    Raises:
        UserError: there is no such file, it is not what its name says, or it is damaged.
    """
    try:
        suffix, compressed = require_suffix(path)
        with path.open("rb") as raw:
            if compressed:
                require_kind(path, raw.read(HEAD), GZIP)
                raw.seek(0)
            with gzip.open(raw) if compressed else raw as file:
                require_kind(path, file.read(HEAD), FORMATS[suffix])
                file.seek(0)
                yield from READERS[suffix](path, file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: correct the data set's file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged gzip file ({error}): fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: check who may read it") from None


def is_read_by_line(name: str) -> bool:
    """Whether a row's number is that of a line, in a file of this name."""
    suffix, _ = suffix_of(name) or ("", False)
    return FORMATS.get(suffix) not in ("JSON", PARQUET)


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    decoder = _Decoder()
    for number, line in enumerate(file, start=1):
        if line.strip():
            if number == 1 and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise UserError(f"{path}: is a JSON array, not JSON lines: name it with .json at the end")
            try:
                yield Row(number, *decoder.whole(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                yield Row(number, None, _why(error))


def _json(path: Path, file: BinaryIO) -> Iterator[Row]:
    """An array of rows, or one row a line, as many tools write it."""
    head = file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    if head.startswith(b"["):
        yield from _json_array(path, file.read())
        return
    for row in _json_lines(path, file):
        if row.fault and row.number == 1:
            _require_no_single_object(path, file)
        yield row


def _require_no_single_object(path: Path, file: BinaryIO) -> None:
    """Raise a `UserError` if the whole file is one JSON object, such as ``{"data": [...]}``."""
    place = file.tell()
    file.seek(0)
    with contextlib.suppress(ValueError, RecursionError):
        whole, _ = _Decoder().whole(file.read().decode("utf-8-sig"))
        if isinstance(whole, dict):
            raise UserError(
                f"{path}: is a single JSON object ({few(list(whole))}), neither an array of rows nor one row a line:"
                " save its rows alone"
            )
    file.seek(place)


def _json_array(path: Path, content: bytes) -> Iterator[Row]:
    decoder, number = _Decoder(), 0
    try:
        text = content.decode("utf-8-sig")
        place = SPACE.match(text, text.index("[") + 1).end()
        while text[place : place + 1] != "]":
            number += 1
            values, fault, place = decoder.part(text, place)
            yield Row(number, None if fault else values, fault)
            place = SPACE.match(text, place).end()
            if text[place : place + 1] == ",":
                place = SPACE.match(text, place + 1).end()
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("',' or ']' is missing", text, place)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: row {number}{line}: {_why(error)}: correct the file") from None


def _comma_separated(path: Path, file: BinaryIO) -> Iterator[Row]:
    return _delimited(path, file, ",")


def _tab_separated(path: Path, file: BinaryIO) -> Iterator[Row]:
    return _delimited(path, file, "\t")


def _delimited(path: Path, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    """Rows by the names in the first line."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader, header = csv.reader(text, delimiter=delimiter, strict=True), None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{path}: line {number}: {error}: put cells with quotes or line breaks in double quotes"
                ) from None
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: line {number}: two columns have the same name: rename one of them")
            elif len(cells) != len(header):
                yield Row(number, None, f"not as many cells as the {len(header)} of the header")
            elif any(map(NOT_UTF_8.search, cells)):
                yield Row(number, None, "not UTF-8")
            else:
                yield Row(number, dict(zip(header, cells, strict=True)))


def _parquet(path: Path, file: BinaryIO) -> Iterator[Row]:
    import pyarrow as pa  # here, since other formats do without
    from pyarrow.parquet import ParquetFile

    # A gzipped file can't be read from its end.
    content = pa.BufferReader(file.read()) if isinstance(file, gzip.GzipFile) else file
    number = 0
    try:
        parquet = ParquetFile(content)
        converted = [field.name for field in parquet.schema_arrow if not _is_json(field.type)]
        for batch in parquet.iter_batches(BATCH):
            for values in batch.to_pylist(maps_as_pydicts="lossy"):
                number += 1
                try:
                    yield Row(number, values | {name: _plain(values[name]) for name in converted})
                except ValueError as error:
                    yield Row(number, None, str(error))
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        said = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{path}: damaged parquet file ({said}), after row {number}: fetch or write it again") from None


def _is_json(kind: Any) -> bool:
    """Whether pyarrow gives every value of a type as JSON has it."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_json(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean, types.is_null)
    return any(is_one(kind) for is_one in plain)


def _plain(value: Any) -> Any:
    """A value of parquet as JSON has it; a `ValueError` for an infinite number."""
    if isinstance(value, dict):
        return {str(key): _plain(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_plain(content) for content in value]
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError("an infinite number, which JSON does not have")
        return None if math.isnan(value) else value
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class _Decoder(json.JSONDecoder):
    """JSON, with a fault where a key is repeated, which leaves open what is meant, or a number is none."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)
        self._fault: str | None = None

    def whole(self, text: str) -> tuple[Any, str | None]:
        """The value of a text and its fault."""
        self._fault = None
        value = self.decode(text)
        return (None if self._fault else value), self._fault

    def part(self, text: str, start: int) -> tuple[Any, str | None, int]:
        """The value that begins at ``start``, its fault, and where it ends."""
        self._fault = None
        value, end = self.raw_decode(text, start)
        return value, self._fault, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._fault = "a key is repeated"
        return found

    def _constant(self, name: str) -> None:
        self._fault = f"not JSON: {name}"


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
}
