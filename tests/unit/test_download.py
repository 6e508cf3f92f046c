"""download.py against a Hub on this machine, with the Hub's own client."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.manifest import read_manifest
from common.errors import UserError
from configuration.schema import Architecture
from configuration.shape import text_config
from evaluation.problems import load_problems
from hub_server import Fault, HubServer, serve

SCRIPTS = Path(__file__).parents[2] / "workflow_scripts"
# The script as it is, less patient between its tries.
IMPATIENT = (
    "import sys, runpy, hub.client; hub.client.WAITS = (0, 0.1, 0.2);"
    f"sys.argv[0] = 'download.py'; runpy.run_path({str(SCRIPTS / 'download.py')!r}, run_name='__main__')"
)
TOKEN = "hf_goodtoken"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
MODEL = {
    "config.json": b'{"model_type": "qwen3_5"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "extra/vocab.json": b"{}",
    "README.md": b"# hello",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "extra/optimizer.pt": b"pickle",
}
WANTED = {name for name in MODEL if not re.search(r"README|\.py$|\.bin|\.pt$", name)}
LFS = {name for name in MODEL if name.endswith(".safetensors")} | {"tokenizer.json", "pytorch_model.bin"}
SHAPE = {"layers": 32, "hidden": 2560, "ffn": 9216, "attention_heads": 16, "key_value_groups": 4, "head_dim": 256}
SHAPE |= {"linear_key_heads": 16, "linear_value_heads": 32, "linear_head_dim": 128, "tied_embeddings": True}
ROWS = b"".join(
    json.dumps({"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "label": str(n + 1)}).encode() + b"\n"
    for n in range(5)
)


@pytest.fixture
def hub():
    with serve() as server:
        yield server


class Run:
    """Runs of download.py in one folder, with one Hub cache."""

    def __init__(self, folder: Path, hub: HubServer | None) -> None:
        self.folder, self.home = folder, folder / "home"
        self.endpoint = hub.address if hub else "http://127.0.0.1:9"  # nothing listens there
        self.manifest = folder / "results" / "tiny" / "download.json"

    def __call__(self, config: dict, **environment: str) -> subprocess.CompletedProcess:
        """Run the script; whatever happens, its output must not hold a token."""
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                IMPATIENT,
                "--provenance",
                json.dumps({"config": config, "code": "c", "upstream": {}}),
                *("--name", "tiny", "--folder", str(self.folder / "results/hub")),
                "--manifest",
                str(self.manifest),
            ],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPTS), "HF_HOME": str(self.home)}
            | {"HF_ENDPOINT": self.endpoint, "HOME": str(self.folder)}
            | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        written = self.manifest.read_text() if self.manifest.exists() else ""
        assert TOKEN not in result.stdout + result.stderr + written
        return result

    def model(self, repo: str = "Qwen/tiny", revision: str = "main", **environment: str) -> subprocess.CompletedProcess:
        return self({"source": {"repo": repo, "revision": revision}}, **environment)

    def succeeds(self, result: subprocess.CompletedProcess):
        assert result.returncode == 0, result.stderr
        return read_manifest(self.manifest).require(digests=True)

    def fails(self, result: subprocess.CompletedProcess, *words: str) -> None:
        """One line, at the end, that holds ``words``; and no manifest."""
        assert result.returncode == 1, result.stderr
        assert "Traceback" not in result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), last
        assert not self.manifest.exists()

    @property
    def cached(self) -> list[str]:
        return [file.name for file in self.home.rglob("blobs/*")]


@pytest.fixture
def download(tmp_path, hub):
    return Run(tmp_path, hub)


def test_a_model_arrives_whole_without_pickles_code_or_copies(hub, download):
    commit = hub.host("Qwen/tiny", MODEL, LFS).refs["main"]
    manifest = download.succeeds(download.model(HF_TOKEN=TOKEN))
    assert manifest.kind == "download"
    assert manifest.facts == {"repo": "Qwen/tiny", "revision": "main", "commit": commit}
    assert manifest.root.resolve() == (download.folder / "results/hub" / f"Qwen--tiny@{commit}").resolve()
    assert set(manifest.files) == WANTED
    for name in WANTED:
        assert (manifest.root / name).read_bytes() == MODEL[name]
        assert manifest.files[name]["sha256"] == hashlib.sha256(MODEL[name]).hexdigest()
        assert (manifest.root / name).stat().st_nlink == 2  # the cache's blob itself
    assert not hub.asked(r"resolve/.*(\.bin|\.pt|\.py)")
    content = hub.asked("/content/")
    assert content and not any("authorization" in request.headers for request in content)
    assert hub.asked("resolve/")[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_second_run_fetches_nothing_and_another_commit_only_what_changed(hub, download):
    hosted = hub.host("Qwen/tiny", MODEL, LFS)
    download.succeeds(download.model())
    hub.requests.clear()
    download.succeeds(download.model())
    assert not hub.asked("^GET .*(/resolve/|/content/)")
    commit = hosted.commit(MODEL | {"config.json": b'{"model_type": "qwen3_5", "new": 1}'})
    hub.requests.clear()
    manifest = download.succeeds(download.model())
    assert manifest.facts["commit"] == commit
    assert [request.path for request in hub.asked("^GET .*(/resolve/|/content/)")] == [
        f"/Qwen/tiny/resolve/{commit}/config.json"
    ]


def test_a_branch_a_tag_and_a_commit_resolve_to_the_commit_they_name(hub, download):
    hosted = hub.host("Qwen/tiny", MODEL, LFS)
    old = hosted.refs["main"]
    new = hosted.commit(MODEL | {"config.json": b"{}"}, branch="next")
    for revision, commit in (("main", old), ("next", new), (old, old)):
        manifest = download.succeeds(download.model(revision=revision))
        assert manifest.facts == {"repo": "Qwen/tiny", "revision": revision, "commit": commit}
        assert (manifest.root / "config.json").read_bytes() == hosted.commits[commit]["config.json"]


def test_a_dropped_connection_resumes_where_it_broke_off(hub, download):
    large = WEIGHTS * 12
    hub.host("Qwen/tiny", {"config.json": b"{}", "model.safetensors": large}, {"model.safetensors"})
    hub.faults.append(Fault("GET /content/", cut=11 * 2**20))
    download.succeeds(download.model())
    ranges = [request.headers.get("range") for request in hub.asked("GET /content/")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]  # the client writes 10 MiB at a time


def test_a_server_that_is_busy_for_a_while_is_asked_again(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    hub.faults = [
        Fault("GET /api/models", 429, {"Retry-After": "1"}),
        Fault("GET /api/models/.*/revision", 503, times=2),
        Fault("GET /api/models/.*/tree", 500, times=2),
        Fault("GET /content/", 503, times=2),
        Fault("GET /content/", 429, {"Retry-After": "1"}),
        Fault("HEAD .*config.json", 500),
    ]
    download.succeeds(download.model())
    assert [fault.times for fault in hub.faults] == [0] * 6


def test_a_server_that_asks_to_wait_is_not_asked_sooner(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    hub.faults.append(Fault("GET /api/models", 429, {"Retry-After": "2"}))
    result = download.model()
    download.succeeds(result)
    assert "model Qwen/tiny: revision main: the Hub answers 429: again in 2 s" in result.stderr


def test_a_server_that_stays_broken_ends_the_run_in_one_line(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    hub.faults.append(Fault("GET /api/models", 502, times=99))
    download.fails(download.model(), "Qwen/tiny", "502", "run again later")


def test_a_server_that_asks_for_hours_is_given_up(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    hub.faults.append(Fault("GET /api/models", 429, {"Retry-After": "7200"}))
    download.fails(download.model(), "429")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "chat_template.jinja"])
def test_a_flipped_bit_is_found_and_the_damaged_file_removed(hub, download, name):
    hub.host("Qwen/tiny", MODEL, LFS)
    digest = hashlib.sha256(MODEL[name]).hexdigest()
    request = f"GET /content/{digest}" if name in LFS else f"GET /Qwen/tiny/resolve/[^/]*/{name}"
    hub.faults.append(Fault(request, content=b"?" + MODEL[name][1:]))
    download.fails(download.model(), name, "removed from the cache")
    download.succeeds(download.model())  # what is damaged, and only that, is fetched again


def test_a_file_damaged_in_the_cache_is_found_offline_too(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    manifest = download.succeeds(download.model())
    download.manifest.unlink()
    with (manifest.root / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.write(b"?")
    download.fails(download.model(HF_HUB_OFFLINE="1"), "model-00001-of-00002.safetensors", "removed from the cache")


def test_offline_works_from_the_cache_and_says_what_it_lacks(hub, download):
    commit = hub.host("Qwen/tiny", MODEL, LFS).refs["main"]
    download.fails(download.model(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE", str(download.home))
    assert not hub.requests
    first = download.succeeds(download.model())
    hub.requests.clear()
    offline = download.succeeds(download.model(HF_HUB_OFFLINE="1"))
    assert not hub.requests
    assert (offline.facts["commit"], offline.files) == (commit, first.files)
    download.manifest.unlink()
    next(download.home.rglob("snapshots/*/tokenizer.json")).unlink()
    download.fails(download.model(HF_HUB_OFFLINE="1"), "does not hold all of it")


def test_without_a_network_the_end_is_one_line_that_names_the_address(tmp_path):
    download = Run(tmp_path, None)
    download.fails(download.model(), "no answer from http://127.0.0.1:9", "HF_HUB_OFFLINE=1")


def test_what_is_not_there_is_named(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    download.fails(download.model("Qwen/nowhere"), "model Qwen/nowhere", "no such repository", "HF_TOKEN")
    download.fails(download.model(revision="v9"), "revision v9", "not a branch, tag or commit")
    download.fails(download.model("not a name"), "not a name", "owner/name")


def test_a_gated_repository_says_how_to_get_in_and_opens_with_the_token(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS).gated = True
    download.fails(download.model(), "gated", "accept its licence", "HF_TOKEN")
    download.fails(download.model(HF_TOKEN="hf_othertoken"), "gated", "HF_TOKEN")
    download.succeeds(download.model(HF_TOKEN=TOKEN))


def test_a_token_that_no_header_can_hold_is_not_printed(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    download.fails(download.model(HF_TOKEN=f"{TOKEN}é"), "HF_TOKEN holds a character")


def test_weights_that_are_pickles_only_are_refused_before_any_is_fetched(hub, download):
    hub.host("Qwen/tiny", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    download.fails(download.model(), "pickles only (pytorch_model.bin)", ".safetensors")
    assert not hub.asked("resolve")


def test_weights_that_the_index_names_and_nobody_has_are_refused(hub, download):
    hub.host("Qwen/tiny", {name: MODEL[name] for name in MODEL if name != "model-00002-of-00002.safetensors"}, LFS)
    download.fails(download.model(), "names model-00002-of-00002.safetensors", "incomplete")


@pytest.mark.parametrize("name", ["../../outside.json", "/outside.json"])
def test_a_name_that_leaves_the_folder_is_refused(hub, download, name):
    hub.host("Qwen/tiny", MODEL | {name: b"{}"})
    download.fails(download.model(), repr(name), "not a name to write to")


def test_only_what_is_missing_must_fit_the_disk(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    sitecustomize = download.folder / "sitecustomize.py"
    sitecustomize.write_text("import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 2**20)")
    path = f"{download.folder}:{SCRIPTS}"
    download.fails(download.model(PYTHONPATH=path), "1.0 MiB free", "make room", "HF_HOME")
    assert not hub.asked("resolve")
    download.succeeds(download.model())
    download.manifest.unlink()
    download.succeeds(download.model(PYTHONPATH=path))


def test_partial_files_of_killed_downloads_do_not_pile_up(hub, download):
    hub.host("Qwen/tiny", MODEL, LFS)
    blobs = download.home / "hub/models--Qwen--tiny/blobs"
    blobs.mkdir(parents=True)
    for name, age in (("old", 7200), ("fresh", 0)):
        partial = blobs / f"{name}.12345678.incomplete"
        partial.write_bytes(b"partial")
        os.utime(partial, (time.time() - age,) * 2)
    download.succeeds(download.model())
    assert [name for name in download.cached if name.endswith(".incomplete")] == ["fresh.12345678.incomplete"]


def test_a_local_folder_is_linked_and_named_by_its_digests(tmp_path):
    download = Run(tmp_path, None)
    folder = tmp_path / "My model"
    for name, content in (MODEL | {".cache/huggingface/trees/a.json": b"{}"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    config = {"source": {"folder": str(folder)}}
    first = download.succeeds(download(config))
    assert first.facts == {"folder": str(folder)}
    assert first.root.name.startswith("tiny@")
    assert set(first.files) == WANTED
    assert (first.root / "config.json").samefile(folder / "config.json")
    assert download.succeeds(download(config)).root == first.root
    (folder / "config.json").unlink()  # not written into: that would change the first snapshot, which shares the file
    (folder / "config.json").write_bytes(b"{}")
    assert download.succeeds(download(config)).root != first.root
    download.manifest.unlink()
    download.fails(download({"source": {"folder": str(tmp_path / "none")}}), "no such folder")


def shaped(**changes) -> bytes:
    """The config.json of a checkpoint of `SHAPE`, changed; context, rotation and norms are the checkpoint's own."""
    text = text_config(Architecture.model_validate(SHAPE)) | {"rope_theta": 1e6, "max_position_embeddings": 4096}
    return json.dumps({"text_config": text | changes}).encode()


def test_another_model_s_checkpoint_is_refused_before_its_weights_are_fetched(hub, download):
    hosted = hub.host("Qwen/tiny", MODEL | {"config.json": shaped(num_hidden_layers=36, hidden_size=4096)}, LFS)
    config = {"source": {"repo": "Qwen/tiny"}, "architecture": SHAPE}
    download.fails(download(config), "config.json: num_layers is 36", "declares 32")
    assert hub.asked("resolve/.*/config.json") and not hub.asked("^GET /content/")
    hosted.commit(MODEL | {"config.json": shaped()})
    assert set(download.succeeds(download(config)).files) == WANTED
    download.succeeds(download(config, HF_HUB_OFFLINE="1"))


def test_another_model_s_checkpoint_in_a_local_folder_is_refused(tmp_path):
    download = Run(tmp_path, None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(shaped(linear_value_head_dim=64))
    config = {"source": {"folder": str(folder)}, "architecture": SHAPE}
    download.fails(download(config), "linear_value_head_dim is 64", "declares 128")
    (folder / "config.json").write_bytes(shaped())
    download.succeeds(download(config))


def test_a_data_set_is_the_one_file_that_the_configuration_names(hub, download):
    files = {"aime.jsonl": ROWS, "other.jsonl": ROWS}
    hosted = hub.host("zhuzilin/aime", files, {"aime.jsonl"}, "datasets")
    download.manifest = download.folder / "results/data/aime.json"
    manifest = download.succeeds(download({"dataset": {"repo": "zhuzilin/aime", "file": "aime.jsonl"}}))
    assert set(manifest.files) == {"aime.jsonl"}
    assert manifest.facts == {
        "repo": "zhuzilin/aime",
        "revision": "main",
        "commit": hosted.refs["main"],
        "file": "aime.jsonl",
        "rows": 5,
        "prompt_key": "prompt",
        "label_key": "label",
    }
    assert (manifest.root / "aime.jsonl").read_bytes() == ROWS
    assert not hub.asked("other.jsonl")
    download.manifest.unlink()
    download.fails(download({"dataset": {"repo": "zhuzilin/aime", "file": "none.jsonl"}}), "holds no file none.jsonl")


def test_a_data_set_of_a_local_folder(tmp_path):
    download = Run(tmp_path, None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sums.jsonl").write_bytes(ROWS)
    (tmp_path / "data/notes.json").write_bytes(b"{}")
    manifest = download.succeeds(download({"dataset": {"folder": str(tmp_path / "data"), "file": "sums.jsonl"}}))
    assert set(manifest.files) == {"sums.jsonl"}
    assert (manifest.facts["folder"], manifest.facts["rows"]) == (str(tmp_path / "data"), 5)
    download.manifest.unlink()
    config = {"folder": str(tmp_path / "data"), "file": "sums.jsonl", "rows": 30}
    download.fails(download({"dataset": config}), "5 usable rows instead of 30")


def test_a_data_set_that_is_edited_in_place_changes_no_snapshot_of_it(tmp_path):
    download = Run(tmp_path, None)
    file = tmp_path / "sums.jsonl"
    file.write_bytes(ROWS)
    config = {"dataset": {"folder": str(tmp_path), "file": "sums.jsonl"}}
    first = download.succeeds(download(config))
    with file.open("r+b") as rows:  # as long as before
        rows.write(ROWS.replace(b"What", b"Whom"))
    assert len(load_problems(first)) == 5
    assert download.succeeds(download(config)).root != first.root
    (first.root / "sums.jsonl").write_bytes(ROWS.replace(b"What", b"Whom"))
    with pytest.raises(UserError, match=r"sums\.jsonl: its sha256 is not the one"):
        load_problems(first)
