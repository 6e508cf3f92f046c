"""Checkpoints in the Hub's format: lazy reading, and writing with the headers of a source checkpoint.

A safetensors file is eight bytes (the header's length), a JSON header (name -> dtype, shape, byte range) and the raw
values (https://huggingface.co/docs/safetensors). Reading maps one tensor's bytes at a time, so memory does not grow
with the file. Writing copies the source's header byte for byte, and with it names, dtypes, order and shards. Pickled
weights are never loaded.
"""

import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from milepost.common.errors import UserError
from milepost.common.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored: the file within the folder, and the bytes ``begin`` to ``end`` of that file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class HubCheckpoint:
    """The weights of a folder in the Hub's format; opening it reads only headers.

    Attributes:
        folder: the checkpoint's folder.
        entries: tensor name -> `Entry`, in the order of the files.
        headers: file name -> its first bytes, up to the tensors' values.

    Raises:
        UserError: no safetensors, a truncated file, or an index or header that is broken or contradicts the files.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self.headers: dict[str, bytes] = {}
        index = self.folder / INDEX
        weight_map = _read_index(index) if index.exists() else None
        for file in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            if not (self.folder / file).is_file():
                raise UserError(_why_absent(self.folder, file, weight_map is not None))
            self.headers[file], entries = _read_header(self.folder, file)
            self.entries.update(entries)
        if weight_map is not None:
            _check_index(index, weight_map, self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Return the tensor ``name``, or those rows of its first axis, on the CPU, memory-mapped from its file.


        Only the pages that are touched are read, and they are freed with the tensor.
        """
        if name not in self.entries:
            raise UserError(f"{self.folder}: has no tensor {name}: download the model again")
        entry = self.entries[name]
        begin, end, shape = entry.begin, entry.end, entry.shape
        if rows is not None:
            row = (end - begin) // max(shape[0], 1)
            begin, end, shape = begin + rows.start * row, begin + rows.stop * row, (len(rows), *shape[1:])
        if begin == end:
            return torch.empty(shape, dtype=entry.dtype)
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        with (self.folder / entry.file).open("rb") as file:
            # A private, copy-on-write mapping: torch needs writable memory, but the file must never change.
            mapped = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        values = torch.frombuffer(mapped, dtype=torch.uint8)[begin - start :]
        if begin % entry.dtype.itemsize:  # allowed by the format, though no known writer does it
            values = values.clone()
        return values.view(entry.dtype).view(shape)

    def side_files(self) -> list[str]:
        """Relative names of the files besides weights: configuration, tokenizer, index and so on."""
        names = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [
            str(name)
            for name in names
            if name.suffix not in OTHER_WEIGHTS and not any(part.startswith(".") for part in name.parts)
        ]


class HubWriter:
    """Writes new values for the tensors of ``source`` into ``folder``, with its files, headers, index and side files.

    Tensors may be written in any order; each goes straight to its place on disk. A context manager: leaving it without
    an exception checks that every tensor was written, and syncs the files.
    """

    def __init__(self, source: HubCheckpoint, folder: Path | str):
        self.source = source
        self.folder = Path(folder)
        self.missing = set(source.entries)
        self._open: dict[str, int] = {}

    def __enter__(self) -> "HubWriter":
        for name in self.source.side_files():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source.folder / name, self.folder / name)
        for file, header in self.source.headers.items():
            self._open[file] = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.truncate(self._open[file], (self.source.folder / file).stat().st_size)
            _write_at(self._open[file], memoryview(header), 0)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the values of ``name``; a dtype or shape other than the source's is a `UserError`."""
        entry = self.source.entries.get(name)
        if entry is None:
            raise UserError(
                f"{self.source.folder}: has no tensor {name}, so it can't be exported: use its own download"
            )
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise UserError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {self.source.folder} has {entry.dtype}"
                f" {entry.shape}: export with the checkpoint that the training started from"
            )
        if entry.begin != entry.end:
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            _write_at(self._open[entry.file], memoryview(values.numpy()), entry.begin)
        self.missing.discard(name)

    def copy(self, name: str) -> None:
        """Copy the source's values of ``name``, bit for bit."""
        self.write(name, self.source.read(name))

    def files(self) -> list[str]:
        """Relative names of everything that was written."""
        return sorted([*self.source.headers, *self.source.side_files()])

    def __exit__(self, kind, *_) -> None:
        for descriptor in self._open.values():
            if kind is None:
                os.fsync(descriptor)
            os.close(descriptor)
        if kind is None and self.missing:
            raise UserError(
                f"{self.folder}: {len(self.missing)} tensors were not written, such as {min(self.missing)}: export with"
                " the checkpoint that the training started from"
            )


def _write_at(descriptor: int, values: memoryview, offset: int) -> None:
    """Write all of ``values`` at ``offset``; one system call writes at most 2 GiB."""
    while values:
        written = os.pwrite(descriptor, values, offset)
        values, offset = values[written:], offset + written


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: holds no weight_map: download the model again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path}: maps {name} to {file!r}, not a safetensors file's name: download the model again")
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], entries: dict[str, Entry]) -> None:
    """Check that the index and the files' headers list the same tensors in the same files."""
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise UserError(f"{path}: {name} is not in {file}, though the index says so: download the model again")
    for name, entry in entries.items():
        if name not in weight_map:
            raise UserError(f"{path}: {name} is in {entry.file}, but not in the index: download the model again")


def _why_absent(folder: Path, file: str, indexed: bool) -> str:
    if indexed:
        return f"{folder / file}: missing, though {INDEX} names it: download the model again"
    if not folder.is_dir():
        return f"{folder}: no such folder"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return f"{folder}: only pickled weights ({pickles[0]}), which are never loaded: use a repository of safetensors"
    return f"{folder}: neither {SINGLE} nor {INDEX}: download the model again"


def _read_header(folder: Path, file: str) -> tuple[bytes, dict[str, Entry]]:
    """A file's bytes before the values, and its tensors; a `UserError` if it is not a complete safetensors file."""
    path = folder / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: truncated or not safetensors ({size} bytes): download it again")
        header = stream.read(length)
    start, end, entries = 8 + length, 8 + length, {}
    try:
        content = json.loads(header)
        for name, tensor in content.items():
            if name == "__metadata__":
                continue
            first, last = tensor["data_offsets"]
            entry = Entry(file, DTYPES[tensor["dtype"]], tuple(tensor["shape"]), start + first, start + last)
            if not 0 <= first <= last or last - first != math.prod(entry.shape) * entry.dtype.itemsize:
                raise ValueError(f"the byte range of {name} does not fit its shape")
            entries[name], end = entry, max(end, entry.end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: invalid safetensors header ({error}): download it again") from None
    if end != size:
        raise UserError(f"{path}: {size} bytes, but its header needs {end}: download it again")
    return length.to_bytes(8, "little") + header, entries
