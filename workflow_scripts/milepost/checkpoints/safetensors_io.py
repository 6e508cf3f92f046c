"""Checkpoints in the Hub's format: lazy reading, and writing with the headers of a source checkpoint.

Reading maps one tensor's bytes at a time, so memory does not grow with the file. Writing copies the source's header
byte for byte, and with it names, dtypes, order and shards. Pickled weights are never loaded.
"""

import mmap
import os
import shutil
from pathlib import Path

import torch

from milepost.checkpoints.headers import INDEX, PICKLES, WEIGHTS, Headers
from milepost.common.errors import UserError
from milepost.common.files import write_json

OTHER_WEIGHTS = (*PICKLES, WEIGHTS, ".gguf", ".h5", ".msgpack", ".onnx")

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


class HubCheckpoint(Headers):
    """The weights of a folder in the Hub's format; opening it reads only headers."""

    def dtype(self, name: str) -> torch.dtype:
        """The type that the tensor ``name`` is stored in."""
        return DTYPES[self.entries[name].dtype]

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Return the tensor ``name``, or those rows of its first axis, on the CPU, memory-mapped from its file.

        Only the pages that are touched are read, and they are freed with the tensor.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        begin, end, shape = entry.begin, entry.end, entry.shape
        if rows is not None:
            row = (end - begin) // max(shape[0], 1)
            begin, end, shape = begin + rows.start * row, begin + rows.stop * row, (len(rows), *shape[1:])
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        with (self.folder / entry.file).open("rb") as file:
            # A private, copy-on-write mapping: torch needs writable memory, but the file must never change.
            mapped = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        values = torch.frombuffer(mapped, dtype=torch.uint8)[begin - start :]
        if begin % dtype.itemsize:  # allowed by the format, though no known writer does it
            values = values.clone()
        return values.view(dtype).view(shape)

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

    Several files without an index get one: without it other tools don't read them. Tensors may be written in any order;
    each goes straight to its place on disk. A context manager: leaving it without an exception checks that every tensor
    was written, and syncs the files.
    """

    def __init__(self, source: HubCheckpoint, folder: Path | str):
        self.source = source
        self.folder = Path(folder)
        self.missing = set(source.entries)
        self._open: dict[str, int] = {}
        self._needs_index = len(source.headers) > 1 and not (source.folder / INDEX).exists()

    def __enter__(self) -> "HubWriter":
        for name in self.source.side_files():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source.folder / name, self.folder / name)
        for file, header in self.source.headers.items():
            self._open[file] = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.truncate(self._open[file], (self.source.folder / file).stat().st_size)
            _write_at(self._open[file], memoryview(header), 0)
        if self._needs_index:
            entries = self.source.entries
            total = sum(entry.end - entry.begin for entry in entries.values())
            weight_map = {name: entry.file for name, entry in entries.items()}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the values of ``name``; a dtype or shape other than the source's is a `UserError`."""
        entry = self.source.entries.get(name)
        if entry is None:
            raise UserError(
                f"{self.source.folder}: has no tensor {name}, so it can't be exported: use its own download"
            )
        if (tensor.dtype, tuple(tensor.shape)) != (self.source.dtype(name), entry.shape):
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
        index = [INDEX] if self._needs_index else []
        return sorted([*self.source.headers, *self.source.side_files(), *index])

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
