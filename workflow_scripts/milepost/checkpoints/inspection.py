"""Judge a checkpoint before it is used: its config.json and index before the weights are fetched, then its headers.

Plain Python, without torch: a dry run does the same with a local folder.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.checkpoints.headers import INDEX, PICKLES, UNQUANTIZED, WEIGHTS, Entry, Headers, read_index, weight_files
from milepost.checkpoints.name_table import HEAD_NAME, text_prefix
from milepost.checkpoints.shards import bind, require_names
from milepost.common.errors import UserError
from milepost.common.files import read_json
from milepost.configuration.schema import Architecture as Shape
from milepost.configuration.shape import require_shape
from milepost.qwen3_5.architecture import Architecture

CONFIG = "config.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # LoRA's, as PEFT saves them
QUANTIZATION = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
CHUNK = 8 * 2**20  # bytes compared at a time


@dataclass(frozen=True)
class Inspection:
    """What a model's settings ask of its checkpoint.

    Attributes:
        shape: the shape that the settings declare, if they do.
        mtp: whether the MTP layer is converted, trained or drafts.
    """

    shape: Shape | None
    mtp: bool

    def check_folder(self, folder: Path) -> None:
        """Refuse (`UserError`) a local ``folder`` that holds no usable model."""
        require_files(str(folder), [path.relative_to(folder).as_posix() for path in folder.rglob("*")])
        self.check_description(folder, str(folder))
        self.check_headers(folder)

    def check_description(self, folder: Path, source: str) -> None:
        """Refuse (`UserError`) a checkpoint by the config.json in ``folder``, and by the index if there is one.

        ``source`` names the checkpoint in messages.
        """
        path = folder / CONFIG
        _refuse_quantized(read_json(path), source)
        architecture = Architecture.from_folder(folder)
        if self.shape:
            require_shape(folder, self.shape)
        if (folder / INDEX).exists():
            require_names(source, architecture, read_index(folder / INDEX), int(self.mtp))

    def check_headers(self, folder: Path) -> None:
        """Refuse (`UserError`) the checkpoint in ``folder`` by its files' headers, and a head that should be tied."""
        architecture, headers = Architecture.from_folder(folder), Headers(folder)
        bind(architecture, headers, int(self.mtp))
        if architecture.tie_embeddings and HEAD_NAME in headers:
            embedding = text_prefix(headers) + "embed_tokens.weight"
            if not _same_bytes(folder, headers.entries[embedding], headers.entries[HEAD_NAME]):
                raise UserError(
                    f"{folder}: {HEAD_NAME} differs from {embedding}, though config.json ties them"
                    " (tie_word_embeddings): correct config.json if they were trained apart, or remove one of them"
                )


def require_files(source: str, names: Collection[str]) -> None:
    """Refuse (`UserError`) a source without a config.json, or without weights as safetensors, by its files' names."""
    weights = weight_files(names, None)
    if not weights or CONFIG not in names:
        for adapter in ADAPTERS:
            if adapter in names:
                raise UserError(
                    f"{source}: holds an adapter ({adapter}), not a model's weights: merge it into its base model"
                    " (PEFT's merge_and_unload and save_pretrained) and use the result"
                )
    if not weights:
        deeper, pickles, ggufs = (sorted(n for n in names if n.endswith(end)) for end in (WEIGHTS, PICKLES, ".gguf"))
        if deeper:
            raise UserError(
                f"{source}: holds {WEIGHTS} files only in subfolders ({deeper[0]}): the weights belong next to"
                f" {CONFIG}; name a source that is that subfolder"
            )
        if pickles:
            raise UserError(
                f"{source}: its weights are pickles only ({pickles[0]}), which are never loaded:"
                f" choose one with {WEIGHTS} files"
            )
        found = f" but {ggufs[0]}" if ggufs else ""
        raise UserError(
            f"{source}: holds no {WEIGHTS} file{found}: name a checkpoint in Transformers' format as source"
        )
    if CONFIG not in names:
        raise UserError(f"{source}: holds no {CONFIG}: name a checkpoint in Transformers' format as source")


def _refuse_quantized(config: Any, source: str) -> None:
    sections = [config, config.get("text_config")] if isinstance(config, dict) else []
    for section in sections:
        for key in QUANTIZATION:
            if isinstance(section, dict) and section.get(key):
                found = section[key]
                method = f": {found['quant_method']}" if isinstance(found, dict) and "quant_method" in found else ""
                raise UserError(f"{source}: quantized ({key}{method} in {CONFIG}): {UNQUANTIZED}")


def _same_bytes(folder: Path, one: Entry, other: Entry) -> bool:
    with (folder / one.file).open("rb") as first, (folder / other.file).open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left:
            size = min(left, CHUNK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True
