"""A manifest detects missing, resized and damaged files."""

import hashlib
import json
import shutil

import pytest

from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.common import versions
from milepost.common.errors import UserError

PROVENANCE = {"config": {"key": 1}, "code": "c", "upstream": {}}


@pytest.fixture
def made(tmp_path):
    """A manifest next to the folder that it describes."""
    (tmp_path / "made/inner").mkdir(parents=True)
    (tmp_path / "made/b.txt").write_bytes(b"first")
    (tmp_path / "made/inner/a.txt").write_bytes(b"second")
    return write_manifest(tmp_path / "made.json", "convert", tmp_path / "made", ["inner/a.txt", "b.txt"], PROVENANCE)


def test_every_file_has_its_own_size_and_digest(made):
    assert made.files == {
        "b.txt": {"bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest()},
        "inner/a.txt": {"bytes": 6, "sha256": hashlib.sha256(b"second").hexdigest()},
    }
    assert (made.kind, made.provenance, made.facts) == ("convert", PROVENANCE, {})
    assert made.require() is made.require(digests=True) is made


def test_files_given_in_another_order_make_the_same_manifest(made, tmp_path):
    was = made.path.read_bytes()
    write_manifest(made.path, "convert", tmp_path / "made", ["b.txt", "inner/a.txt"], PROVENANCE)
    assert made.path.read_bytes() == was


@pytest.mark.parametrize(
    ("content", "digests", "said"),
    [
        (None, False, "missing, though .* lists it"),
        (b"seco", False, "4 bytes, .* says 6"),
        (b"second and more", False, "15 bytes, .* says 6"),
        (b"sec0nd", False, None),
        (b"sec0nd", True, "its sha256 is not the one"),
    ],
)
def test_a_file_that_is_missing_cut_longer_or_changed_is_named(made, content, digests, said):
    file = made.root / "inner/a.txt"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    if said is None:
        made.require(digests=digests)
    else:
        with pytest.raises(UserError, match=rf"inner/a\.txt: {said}"):
            made.require(digests=digests)


def test_a_manifest_stays_valid_when_moved_with_its_folder(made, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("made", "made.json"):
        shutil.move(tmp_path / name, moved / name)
    assert read_manifest(moved / "made.json").require(digests=True).root == moved / "made"


def test_the_packages_that_decide_results_are_recorded(made, monkeypatch):
    installed = {name: f"{number}.0" for number, name in enumerate(versions.RECORDED)} | {"pytest": "9.0"}
    monkeypatch.setattr(versions.importlib.metadata, "version", installed.__getitem__)
    recorded = {"torch", "megatron-core", "transformers", "sglang", "flash-linear-attention", "sympy", "snakemake"}
    assert recorded <= set(versions.versions()) and "pytest" not in versions.versions()
    assert made.versions == json.loads(made.path.read_text())["versions"] and "torch" in made.versions


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "train"}', "null"])
def test_another_file_is_refused_as_a_manifest(tmp_path, content):
    (tmp_path / "made.json").write_text(content)
    with pytest.raises(UserError, match=r"made\.json: not a manifest: delete it and run again"):
        read_manifest(tmp_path / "made.json")
