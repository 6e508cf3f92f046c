"""The files of a data set are found by name, pattern, subset and split, in a folder as in a repository."""

import pytest

from milepost.common.errors import UserError
from milepost.configuration.schema import Dataset
from milepost.hub.client import Listing, RemoteFile, Repository
from milepost.hub.snapshot import RepositoryFiles
from milepost.problems.selection import LocalFolder, select_files

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - split: test
    path: [main/test-0.parquet, main/test-1.parquet]
- config_name: socratic
  data_dir: soc
  data_files: "*.csv"
---
# GSM8K
"""
LISTED = ["main/train-0.parquet", "main/train-1.parquet", "main/test-0.parquet", "main/test-1.parquet", "soc/a.csv"]
LISTED += ["main/train-notes.md", ".gitattributes", "soc/sub/b.csv"]
SPREAD = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]


@pytest.fixture(params=["folder", "repository"])
def chosen(request, tmp_path, monkeypatch):
    """``chosen(names, card, **settings)`` -> the files, of a local folder and of a repository."""

    def call(names, card="", **settings):
        names = [*names, *(["README.md"] if card else [])]
        if request.param == "folder":
            place = LocalFolder(tmp_path)
            for name in names:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(card if name == "README.md" else "")
        else:
            (tmp_path / "README.md").write_text(card)
            monkeypatch.setattr("milepost.hub.snapshot.cached", lambda listing: tmp_path)
            files = {name: RemoteFile(1, "") for name in sorted(names)}
            place = RepositoryFiles(Listing(Repository("dataset", "owner/name"), "c" * 40, files))
        return select_files(place, Dataset(repo="owner/name", **settings), "here", "mine")

    return call


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("main/train-1.parquet", ["main/train-1.parquet"]),
        ("main/*.parquet", [*LISTED[2:4], *LISTED[:2]]),
        (["soc/a.csv", "main/test-?.parquet"], ["main/test-0.parquet", "main/test-1.parquet", "soc/a.csv"]),
        ("main/t[er][sa]*-[!0].parquet", ["main/test-1.parquet", "main/train-1.parquet"]),
        ("**/*.csv", ["soc/a.csv", "soc/sub/b.csv"]),
        ("soc/**.csv", ["soc/a.csv", "soc/sub/b.csv"]),
        ("*/a.csv", ["soc/a.csv"]),
    ],
)
def test_files_are_named_by_patterns_and_read_in_order(chosen, file, found):
    assert chosen(LISTED, CARD, file=file) == found


def test_a_name_that_looks_like_a_pattern_is_a_name(chosen):
    assert chosen(["rows[1].csv", "rows1.csv"], file="rows[1].csv") == ["rows[1].csv"]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"subset": "main", "split": "train"}, LISTED[:2]),
        ({"subset": "main", "split": "test"}, LISTED[2:4]),
        ({"subset": "socratic"}, ["soc/a.csv"]),
    ],
)
def test_the_card_lists_the_files_of_subset_and_split(chosen, settings, found):
    assert chosen(LISTED, CARD, **settings) == found


@pytest.mark.parametrize(
    "card",
    [
        CARD.replace("config_name: main", "config_name: default"),
        CARD.replace("config_name: main", "config_name: main\n  default: true"),
    ],
)
def test_the_default_subset_need_not_be_named(chosen, card):
    assert chosen(LISTED, card, split="test") == LISTED[2:4]


@pytest.mark.parametrize(
    ("names", "settings", "found"),
    [
        (SPREAD, {"split": "train"}, SPREAD[:2]),
        (["train.jsonl", "test.jsonl"], {"split": "test"}, ["test.jsonl"]),
        (["test-00000-of-00001.parquet", "train_notes.md"], {"split": "test"}, ["test-00000-of-00001.parquet"]),
        (["main/test-00000.parquet", "other/test-00000.parquet"], {"subset": "main", "split": "test"},
         ["main/test-00000.parquet"]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], {"subset": "default", "split": "train"},
         ["default/train/0000.parquet", "default/train/0001.parquet"]),
        (["data/main/test.csv.gz"], {"subset": "main", "split": "test"}, ["data/main/test.csv.gz"]),
        (["diamond.csv", "main.csv"], {"subset": "diamond"}, ["diamond.csv"]),
        (["rows.jsonl", "notes.md"], {}, ["rows.jsonl"]),
        (["data/rows.csv"], {}, ["data/rows.csv"]),
    ],
)  # fmt: skip
def test_without_a_list_the_usual_layouts_are_known(chosen, names, settings, found):
    assert chosen(names, "---\nlicense: mit\n---\n", **settings) == found
    assert chosen(names, "# no head", **settings) == found


@pytest.mark.parametrize(
    ("names", "card", "settings", "said"),
    [
        (LISTED, CARD, {}, "here: several subsets: README.md lists subset main with train, test; subset socratic with"
         " train: set subset and split of datasets.mine"),
        (LISTED, CARD, {"subset": "man"}, "here: no subset man: README.md lists subset main with"),
        (LISTED, CARD, {"subset": "main"}, "here: several splits: README.md lists subset main with"),
        (LISTED, CARD, {"subset": "main", "split": "dev"}, "here: no split dev: README.md lists subset main with"),
        (["x.csv"], CARD, {"subset": "main", "split": "train"}, "here: README.md lists main/train-* for the split"
         " train, and no file fits; there: x.csv: name the file with datasets.mine.file"),
        (SPREAD, "", {"split": "dev"}, "here: no data file of the split dev; there: data/test-00000-of-00001.parquet,"
         " data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet: correct datasets.mine"),
        (SPREAD, "", {}, "here: data/test-00000-of-00001.parquet, data/train-00000-of-00002.parquet,"),
        (["a.csv", "a.jsonl"], "", {"split": "a"}, "here: a.csv, a.jsonl all fit: name what to read with"),
        (["a.csv"], "", {"file": "*.json"}, "here: holds no file *.json; there: a.csv: correct datasets.mine.file"),
        (["a.md"], "", {"file": ["a.md", "/a.md"]}, "here: holds no file /a.md; there is no data file"),
        ([f"{n}.csv" for n in range(9)], "", {"file": "x"}, "here: holds no file x; there: 0.csv, 1.csv, 2.csv, 3.csv,"
         " 4.csv, 5.csv, 3 more: correct"),
    ],
)  # fmt: skip
def test_what_is_not_found_is_answered_by_what_there_is(chosen, names, card, settings, said):
    with pytest.raises(UserError) as error:
        chosen(names, card, **settings)
    assert str(error.value).startswith(said)
