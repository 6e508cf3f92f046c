"""Tell what a file is from its first bytes, and say so where it is not what its name promises."""

import re
from pathlib import Path

from milepost.common.errors import UserError

HEAD = 512  # bytes that are enough to tell
PARQUET, GZIP, TEXT = "parquet", "compressed with gzip", "text"
FORMATS = {  # suffix -> what the file must hold
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".parquet": PARQUET,
    ".csv": "CSV",
    ".tsv": "TSV",
}
COMPRESSED = ".gz"

# What a file begins with, what that is, and what to do with it.
MAGIC = (
    (rb"PAR1", PARQUET, "name it with .parquet at the end"),
    (rb"\x1f\x8b", GZIP, "name it with .gz at the end"),
    (rb"PK\x03\x04", "a ZIP archive", "unpack it; save a spreadsheet as CSV"),
    (
        rb"BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd",
        "compressed, but not with gzip",
        "unpack it, or compress it with gzip",
    ),
    (rb"ARROW1\0|\xff\xff\xff\xff", "an Arrow file", "save it as parquet (`to_parquet`)"),
    (rb"\x80[\x02-\x05]", "a pickle, which is never loaded", "save it as parquet or JSON lines"),
    (rb"version https://git-lfs", "a Git LFS pointer instead of the file", "fetch the file itself with `git lfs pull`"),
    (
        rb"(?i)\s*<(?:!doctype|html|head|\?xml)",
        "a web page (HTML)",
        "download the file itself; on the Hub its address has /resolve/, not /blob/",
    ),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    (rb"[^\0]*+\0", "binary data of an unknown kind", f"give one of {', '.join(FORMATS)}, or these with {COMPRESSED}"),
    (rb"\Z", "empty", "fetch or write it again"),
)


def suffix_of(name: str) -> tuple[str, bool] | None:
    """The suffix that gives a file's format, and whether the file is gzipped; None for a name without such a suffix."""
    lowered = name.lower()
    plain = lowered.removesuffix(COMPRESSED)
    suffix = next((suffix for suffix in FORMATS if plain.endswith(suffix)), None)
    return (suffix, plain != lowered) if suffix else None


def require_suffix(path: Path) -> tuple[str, bool]:
    """`suffix_of`; a name without one is a `UserError` that says what the file is."""
    if found := suffix_of(path.name):
        return found
    with path.open("rb") as file:
        kind, remedy = kind_of(file.read(HEAD))
    what = "" if kind == TEXT else f" it is {kind};"
    remedy = remedy if kind not in (TEXT, GZIP, PARQUET) else f"name it with one of {', '.join(FORMATS)} at the end"
    raise UserError(f"{path}: its name does not say its format;{what} {remedy}")


def require_kind(path: Path, head: bytes, wanted: str) -> None:
    """Raise a `UserError` unless a file that begins with ``head`` can be ``wanted``, a value of `FORMATS` or gzip."""
    kind, remedy = kind_of(head)
    if kind == (wanted if wanted in (PARQUET, GZIP) else TEXT):
        return
    if kind == TEXT:
        remedy = f"name it after its format ({', '.join(FORMATS)}), without {COMPRESSED} where it is not compressed"
    raise UserError(f"{path}: is {kind}, not {wanted}: {remedy}")


def kind_of(head: bytes) -> tuple[str, str]:
    """What a file is that begins with ``head``, and what to do where something else is expected."""
    for magic, kind, remedy in MAGIC:
        if re.match(magic, head):
            return kind, remedy
    return TEXT, ""
