"""Checkpoints in the Hub's format: exact reading and writing, and a one-line error for each kind of damage."""

import json

import pytest
import torch
from safetensors.torch import save_file

from milepost.checkpoints.safetensors_io import INDEX, HubCheckpoint, HubWriter
from milepost.common.errors import UserError
from tiny_hub import write_weights

FIRST = "model-00001-of-00002.safetensors"


def some_tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(33, 7, generator=random).bfloat16(),
        "b.A_log": torch.randn(5, generator=random),
        "c.weight": torch.randn(2, 3, 4, generator=random).half(),
        "d.flags": torch.tensor([True, False, True]),
        "e.empty": torch.empty(0, 4),
        "f.weight": torch.randn(1000, 100, generator=random).bfloat16(),
    }


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards with side files, one of them in a subfolder."""
    folder = tmp_path / "hub"
    folder.mkdir()
    write_weights(folder, some_tensors(), shards=2)
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_bytes(b"\x00kept\xff")
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_every_tensor_is_read_with_its_name_type_shape_and_bits(tmp_path, shards):
    write_weights(tmp_path, some_tensors(), shards)
    hub = HubCheckpoint(tmp_path)
    assert set(hub) == set(some_tensors())
    for name, expected in some_tensors().items():
        value = hub.read(name)
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert value.equal(expected), name


def test_rows_of_a_tensor_are_read_alone(folder):
    rows = HubCheckpoint(folder).read("f.weight", range(700, 903))
    assert rows.equal(some_tensors()["f.weight"][700:903])


def test_a_tensor_that_is_not_aligned_to_its_type_is_read(tmp_path):
    values = torch.arange(6, dtype=torch.float32)
    header = (
        b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[1,25]},"p":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    content = len(header).to_bytes(8, "little") + header + b"\x07" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    assert HubCheckpoint(tmp_path).read("w").equal(values)


def test_changing_a_read_tensor_leaves_the_file_alone(folder):
    before = (folder / FIRST).read_bytes()
    for name in HubCheckpoint(folder):
        HubCheckpoint(folder).read(name).zero_()
    assert (folder / FIRST).read_bytes() == before


def test_written_back_in_any_order_the_files_are_the_same_bytes(folder, tmp_path):
    hub = HubCheckpoint(folder)
    with HubWriter(hub, tmp_path / "copy") as writer:
        for name in sorted(hub, reverse=True):
            writer.write(name, hub.read(name).clone())
    everything = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert writer.files() == [str(name) for name in everything]
    for name in everything:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes(), name


def test_weights_in_other_formats_and_hidden_files_are_not_side_files(folder):
    for name in ("pytorch_model.bin", "model.gguf", ".lock", "consolidated.safetensors"):
        (folder / name).write_bytes(b"x")
    assert HubCheckpoint(folder).side_files() == ["config.json", "extra/notes.txt", INDEX]


def test_a_tensor_that_never_came_is_named(folder, tmp_path):
    hub = HubCheckpoint(folder)
    with pytest.raises(UserError, match=r"b\.A_log"), HubWriter(hub, tmp_path / "copy") as writer:
        for name in hub:
            if name != "b.A_log":
                writer.copy(name)


@pytest.mark.parametrize(
    "values", [torch.zeros(33, 7), torch.zeros(7, 33, dtype=torch.bfloat16)], ids=["type", "shape"]
)
def test_a_tensor_of_another_type_or_shape_is_not_written(folder, tmp_path, values):
    with pytest.raises(UserError, match=r"a\.weight"), HubWriter(HubCheckpoint(folder), tmp_path / "copy") as writer:
        writer.write("a.weight", values)


@pytest.mark.parametrize("kept", [0, 7, 8, 60, 500, -1])
def test_a_cut_file_is_named(folder, kept):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:kept])
    with pytest.raises(UserError, match=FIRST) as caught:
        HubCheckpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"not json",
        b'{"w": 1}',
        b'{"w": {"dtype": "F32", "shape": [2]}}',
        b'{"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [-8, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        HubCheckpoint(tmp_path)


def test_an_absent_shard_is_named(folder):
    (folder / FIRST).unlink()
    with pytest.raises(UserError, match=f"{FIRST}: missing"):
        HubCheckpoint(folder)


def change_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda names: names.update(ghost=FIRST), "ghost"),
        (lambda names: names.pop("a.weight"), "a.weight"),
        (lambda names: names.update({"a.weight": "model-00002-of-00002.safetensors"}), "a.weight"),
        (lambda names: names.update({"a.weight": "../elsewhere.safetensors"}), "elsewhere"),
        (lambda names: names.update({"a.weight": "weights.bin"}), "weights.bin"),
        (lambda names: names.clear(), "weight_map"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(folder, change, named):
    change_index(folder, change)
    with pytest.raises(UserError, match=named):
        HubCheckpoint(folder)


def test_pickled_weights_are_never_loaded(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\)"):
        HubCheckpoint(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        HubCheckpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        HubCheckpoint(tmp_path / "absent")


def test_what_safetensors_itself_writes_and_reads_agrees(folder, tmp_path):
    from safetensors import safe_open

    save_file(some_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt", "note": "é"})
    hub = HubCheckpoint(tmp_path)
    with HubWriter(hub, tmp_path / "copy") as writer:
        for name in hub:
            writer.copy(name)
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as written:
        assert written.metadata() == {"format": "pt", "note": "é"}
        assert all(written.get_tensor(name).equal(value) for name, value in some_tensors().items())
