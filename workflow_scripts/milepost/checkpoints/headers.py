"""The headers of a checkpoint in the Hub's format: which tensors it holds, where, and in what type and shape.

A safetensors file is eight bytes (the header's length), a JSON header (name -> dtype, shape, byte range) and the raw
values (https://huggingface.co/docs/safetensors). Plain Python, so that a checkpoint can be judged without torch.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from milepost.common.errors import UserError
from milepost.common.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NOT_THE_MODEL = ("adapter_", "consolidated")  # the names of files of weights that are not the model's in this format
UNQUANTIZED = "choose one whose weights are bf16, fp16 or fp32"

# Bytes of a value. Formats that are not here only occur in quantized checkpoints.
WIDTHS = {
    **{"BF16": 2, "F16": 2, "F32": 4, "F64": 8},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
    **{"I16": 2, "I32": 4, "I64": 8},
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored: the file within the folder, and the bytes ``begin`` to ``end`` of that file.

    ``dtype`` is safetensors' name of the type, a key of `WIDTHS`.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Headers:
    """What the headers of a checkpoint's files say; a mapping of tensor names to entries.

    Attributes:
        folder: the checkpoint's folder.
        entries: tensor name -> `Entry`, in the order of the files.
        headers: file name -> its first bytes, up to the tensors' values.

    Raises:
        UserError: no safetensors, a truncated file, a quantized format, or an index or header that is broken or
            contradicts the files.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self.headers: dict[str, bytes] = {}
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder: correct the path")
        index = self.folder / INDEX
        weight_map = read_index(index) if index.exists() else None
        for file in weight_files((path.name for path in self.folder.iterdir()), weight_map):
            if not (self.folder / file).is_file():
                raise UserError(f"{self.folder / file}: missing, though {INDEX} names it: add it to the folder")
            self.headers[file], entries = _read_header(self.folder, file)
            if twice := self.entries.keys() & entries.keys():
                raise UserError(
                    f"{self.folder}: {min(twice)} is in {self.entries[min(twice)].file} and in {file}, and no {INDEX}"
                    " says which counts: remove the file that does not belong to the model"
                )
            self.entries.update(entries)
        if not self.headers:
            raise UserError(_why_absent(self.folder))
        if weight_map is not None:
            _check_index(index, weight_map, self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)


def weight_files(names: Iterable[str], weight_map: dict[str, str] | None) -> list[str]:
    """The files of a model's weights, sorted, among the ``names`` in its folder.

    They are those in the index (``weight_map``) or, without one, model.safetensors or all safetensors files.
    """
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    found = [name for name in names if name.endswith(WEIGHTS) and "/" not in name and not name.startswith(".")]
    return [SINGLE] if SINGLE in found else sorted(name for name in found if not name.startswith(NOT_THE_MODEL))


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index ``path``."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: holds no weight_map: replace it by the checkpoint's own index")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(WEIGHTS):
            raise UserError(
                f"{path}: maps {name} to {file!r}, not a safetensors file's name: replace it by the checkpoint's own"
                " index"
            )
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], entries: dict[str, Entry]) -> None:
    """Check that the index and the files' headers list the same tensors in the same files."""
    remove = "remove the index if the files are complete without it"
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise UserError(f"{path}: {name} is not in {file}, though the index says so: {remove}")
    for name, entry in entries.items():
        if name not in weight_map:
            raise UserError(f"{path}: {name} is in {entry.file}, but not in the index: {remove}")


def _why_absent(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return f"{folder}: only pickled weights ({pickles[0]}), which are never loaded: save them as safetensors"
    return f"{folder}: holds no {WEIGHTS} file of a model: add the weights"


def _read_header(folder: Path, file: str) -> tuple[bytes, dict[str, Entry]]:
    """A file's bytes before the values, and its tensors; a `UserError` if it is not a complete safetensors file."""
    path = folder / file
    size = path.stat().st_size
    whole = "replace it by a whole copy"
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: truncated or not safetensors ({size} bytes): {whole}")
        header = stream.read(length)
    start, end, entries = 8 + length, 8 + length, {}
    try:
        content = json.loads(header)
        for name, tensor in content.items():
            if name == "__metadata__":
                continue
            dtype, (first, last) = str(tensor["dtype"]), tensor["data_offsets"]
            if dtype not in WIDTHS:
                raise UserError(f"{path}: {name} is stored as {dtype}, a quantized format: {UNQUANTIZED}")
            entry = Entry(file, dtype, tuple(tensor["shape"]), start + first, start + last)
            if not 0 <= first <= last or last - first != math.prod(entry.shape) * WIDTHS[dtype]:
                raise ValueError(f"the byte range of {name} does not fit its shape")
            entries[name], end = entry, max(end, entry.end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: invalid safetensors header ({error}): {whole}") from None
    if end != size:
        raise UserError(f"{path}: {size} bytes, but its header needs {end}: {whole}")
    return length.to_bytes(8, "little") + header, entries
