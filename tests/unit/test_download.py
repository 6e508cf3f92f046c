"""download.py against a local Hub, with the Hub's own client."""

import hashlib
import json
import os
import time

import pytest

from hub_runs import LFS, MODEL, SCRIPTS, TOKEN, WANTED, WEIGHTS, Run, checkpoint, config_json
from hub_server import Fault, serve

# The shape of the hosted model.
SHAPE = {"layers": 4, "hidden": 64, "ffn": 128, "attention_heads": 4, "key_value_groups": 2, "head_dim": 32}
SHAPE |= {"linear_key_heads": 2, "linear_value_heads": 4, "linear_head_dim": 16, "tied_embeddings": True}
SHAPE |= {"vocabulary": 288}


@pytest.fixture
def hub():
    with serve() as server:
        yield server


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
    commit = hosted.commit(MODEL | {"config.json": config_json(new=1)})
    hub.requests.clear()
    manifest = download.succeeds(download.model())
    assert manifest.facts["commit"] == commit
    assert [request.path for request in hub.asked("^GET .*(/resolve/|/content/)")] == [
        f"/Qwen/tiny/resolve/{commit}/config.json"
    ]


def test_a_branch_a_tag_and_a_commit_resolve_to_the_commit_they_name(hub, download):
    hosted = hub.host("Qwen/tiny", MODEL, LFS)
    old = hosted.refs["main"]
    new = hosted.commit(MODEL | {"config.json": config_json(new=1)}, branch="next")
    for revision, commit in (("main", old), ("next", new), (old, old)):
        manifest = download.succeeds(download.model(revision=revision))
        assert manifest.facts == {"repo": "Qwen/tiny", "revision": revision, "commit": commit}
        assert (manifest.root / "config.json").read_bytes() == hosted.commits[commit]["config.json"]


def test_a_dropped_connection_resumes_where_it_broke_off(hub, download):
    hub.host("Qwen/tiny", checkpoint(shards=1, padding=12 * 2**20), {"model.safetensors"})
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
    assert "model Qwen/tiny: revision main: the Hub answers 429: retrying in 2 s" in result.stderr


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
    download.succeeds(download.model())  # only the damaged file is fetched again


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


def test_without_a_network_one_line_names_the_address(tmp_path):
    download = Run(tmp_path, None)
    download.fails(download.model(), "no answer from http://127.0.0.1:9", "HF_HUB_OFFLINE=1")


def test_a_missing_repository_revision_or_file_is_named(hub, download):
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
    download.fails(download.model(HF_TOKEN=f"{TOKEN}é"), "the token in HF_TOKEN contains an invalid character")


def test_weights_that_are_pickles_only_are_refused_before_any_is_fetched(hub, download):
    hub.host("Qwen/tiny", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    download.fails(download.model(), "pickles only (pytorch_model.bin)", ".safetensors")
    assert not hub.asked("resolve")


def test_weights_that_the_index_names_but_are_missing_are_refused(hub, download):
    hub.host("Qwen/tiny", {name: MODEL[name] for name in MODEL if name != "model-00002-of-00002.safetensors"}, LFS)
    download.fails(download.model(), "names model-00002-of-00002.safetensors, which is missing", "complete the source")
    assert not hub.asked("resolve/.*model-00001")


def test_only_the_weights_that_the_index_names_are_fetched(hub, download):
    """Not those of a training's checkpoints or of another format, nor their index; files next to them are."""
    others = {
        "checkpoint-100/model.safetensors": WEIGHTS[1:],
        "checkpoint-100/model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "nowhere.safetensors"}}
        ).encode(),
        "original/consolidated.safetensors": WEIGHTS[2:],
        "consolidated.safetensors": WEIGHTS[3:],
    }
    hub.host("Qwen/tiny", MODEL | others | {"original/params.json": b"{}"}, LFS | set(others))
    for offline in ("0", "1"):
        manifest = download.succeeds(download.model(HF_HUB_OFFLINE=offline))
        assert set(manifest.files) == WANTED | {"original/params.json"}
    assert not any(hub.asked(f"resolve/.*/{name}") for name in ("checkpoint-100", "consolidated"))


def test_without_an_index_the_weights_of_the_top_folder_are_fetched(hub, download):
    files = checkpoint(shards=1) | {"checkpoint-100/model.safetensors": WEIGHTS[1:]}
    hub.host("Qwen/tiny", files, {"model.safetensors", "checkpoint-100/model.safetensors"})
    manifest = download.succeeds(download.model())
    assert set(manifest.files) == {"config.json", "model.safetensors"}
    hub.host("Qwen/tiny", {name: files[name] for name in files if name != "model.safetensors"})
    download.manifest.unlink()
    download.fails(download.model(), "only in subfolders (checkpoint-100/model.safetensors)", "next to config.json")


def test_a_name_that_a_pattern_would_not_fit_is_fetched(hub, download):
    files = {"config.json": config_json(), "model[1].safetensors": WEIGHTS}
    hub.host("Qwen/tiny", files, {"model[1].safetensors"})
    for offline in ("0", "1"):
        assert set(download.succeeds(download.model(HF_HUB_OFFLINE=offline)).files) == set(files)


@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": {}}', b"not JSON"])
def test_an_index_that_names_no_weights_is_refused_before_they_are_fetched(hub, download, index):
    hub.host("Qwen/tiny", MODEL | {"model.safetensors.index.json": index}, LFS)
    download.fails(
        download.model(),
        "model.safetensors.index.json",
        "holds no weight_map" if index[:1] in b"[{" else "not valid JSON",
    )
    assert not hub.asked("/content/.*")


@pytest.mark.parametrize("name", ["../../outside.json", "/outside.json"])
def test_a_name_that_leaves_the_folder_is_refused(hub, download, name):
    hub.host("Qwen/tiny", MODEL | {name: b"{}"})
    download.fails(download.model(), repr(name), "not safe to write")


def test_only_the_weights_that_are_missing_must_fit_the_disk(hub, download):
    hub.host("Qwen/tiny", checkpoint(shards=1, padding=2**20), {"model.safetensors"})
    sitecustomize = download.folder / "sitecustomize.py"
    sitecustomize.write_text("import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 2**20)")
    path = f"{download.folder}:{SCRIPTS}"
    download.fails(download.model(PYTHONPATH=path), "1.0 MiB free", "make room", "HF_HOME")
    assert not hub.asked("/content/.*")
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
    (folder / "config.json").unlink()  # replaced, not overwritten: the first snapshot shares the file
    (folder / "config.json").write_bytes(config_json(new=1))
    assert download.succeeds(download(config)).root != first.root
    download.manifest.unlink()
    download.fails(download({"source": {"folder": str(tmp_path / "none")}}), "no such folder")


def test_another_model_s_checkpoint_is_refused_before_its_weights_are_fetched(hub, download):
    hosted = hub.host("Qwen/tiny", MODEL | {"config.json": config_json(num_attention_heads=8, hidden_size=128)}, LFS)
    settings = {"source": {"repo": "Qwen/tiny"}, "architecture": SHAPE}
    download.fails(download(settings), "config.json: hidden_size is 128", "declares 64")
    assert hub.asked("resolve/.*/config.json") and not hub.asked("^GET /content/")
    hosted.commit(MODEL | {"config.json": config_json(max_position_embeddings=8192)})  # which the shape does not say
    assert set(download.succeeds(download(settings)).files) == WANTED
    download.succeeds(download(settings, HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"config.json": config_json(quantization_config={"quant_method": "gptq"})},
            "quantized (quantization_config: gptq",
        ),
        ({"config.json": config_json(model_type="qwen3_next")}, "not a Qwen3.5 text model (model_type 'qwen3_next')"),
        (
            {"config.json": config_json(num_hidden_layers=8, layer_types=None)},
            "has no tensor model.language_model.layers.4.",
        ),
        ({"config.json": None, "adapter_config.json": b"{}"}, "holds an adapter (adapter_config.json)"),
    ],
    ids=["quantized", "other-family", "other-tensors", "adapter"],
)
def test_what_config_json_and_the_index_tell_is_known_before_the_weights_are_fetched(hub, download, files, said):
    hosted = {name: content for name, content in (MODEL | files).items() if content is not None}
    hub.host("Qwen/tiny", hosted, LFS)
    download.fails(download.model(), said)
    assert not hub.asked("^GET /content/")


def test_another_model_s_checkpoint_in_a_local_folder_is_refused(tmp_path):
    download = Run(tmp_path, None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(config_json(linear_value_head_dim=64))
    settings = {"source": {"folder": str(folder)}, "architecture": SHAPE}
    download.fails(download(settings), "linear_value_head_dim is 64", "declares 16")
    (folder / "config.json").write_bytes(config_json())
    download.succeeds(download(settings))
