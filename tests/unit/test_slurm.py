"""Preflight under Slurm queries sinfo, or says that it could not."""

import os

import pytest

from milepost.common.errors import UserError
from milepost.configuration.loading import load
from milepost.configuration.preflight import check_jobs
from milepost.configuration.provenance import Provenance
from milepost.configuration.slurm import Node, nodes_of

NODES = """main*|gpu:h100:8(S:0-1)|2063937|128
main*|gpu:a100:4,shard:16|515000|64+
debug|(null)|64000|16
debug|gpu:2,gpu:l4:1|64000|48
"""


@pytest.fixture
def sinfo(tmp_path, monkeypatch):
    """A sinfo that reports `NODES`; tests may overwrite it."""
    tool = tmp_path / "bin/sinfo"
    tool.parent.mkdir()
    (tmp_path / "nodes").write_text(NODES)
    tool.write_text(
        f"""#!/bin/sh
[ "$1 $2" = "--noheader --Node" ] || exit 1
if [ "$3" = --partition ]; then grep "^$4\\b" {tmp_path}/nodes; else cat {tmp_path}/nodes; fi
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return tool


def test_the_nodes_are_those_of_the_partition(sinfo):
    main = [Node(8, 2063937 / 1024, 128), Node(4, 515000 / 1024, 64)]
    assert nodes_of("main") == nodes_of(None) == main
    assert nodes_of("debug") == [Node(0, 62.5, 16), Node(3, 62.5, 48)]


def check(root, capsys, partitions, overrides=None) -> str:
    """Run preflight for 9B's conversion and training; return its warnings."""
    configuration = load(root / "config/config.yaml", root / "config/models", overrides or {})
    jobs = [("convert", {"model": "9B"}), ("train", {"model": "9B"})]
    check_jobs(jobs, configuration, Provenance(configuration, root / "workflow_scripts"), partitions)
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def roomy(monkeypatch):
    monkeypatch.setattr("milepost.configuration.preflight.free_bytes", lambda folder: 2**50)


def test_a_partition_with_a_node_that_has_everything_will_do(root, sinfo, capsys):
    said = check(root, capsys, {"convert": "main", "train": "main"})
    assert said == (
        "preflight: the nodes of Slurm's partition main were checked for GPUs, memory and cores;"
        " what a GPU holds and what is installed there was not asked\n"
    )


def test_what_no_node_has_is_refused_for_the_stage_that_asks_for_it(root, sinfo, capsys):
    with pytest.raises(UserError) as refused:
        check(root, capsys, {"convert": "main", "train": "debug"})
    assert str(refused.value).startswith(
        "9B asks for 8 GPUs (hardware.gpus), and the nodes of Slurm's partition debug have at most 3;"
        " 9B asks for 192 GiB of memory (hardware.host_memory_gib), and the nodes of Slurm's partition debug have at"
        " most 62; 9B asks for 64 cores (hardware.cores), and the nodes of Slurm's partition debug have at most 48 ("
    )
    with pytest.raises(UserError, match="9B asks for 192 GiB of memory") as refused:
        check(root, capsys, {"convert": "debug", "train": "main"})
    assert "GPUs" not in str(refused.value) and "cores" not in str(refused.value)


def test_one_node_must_have_all_of_it(root, sinfo, capsys, tmp_path):
    (tmp_path / "nodes").write_text("main*|gpu:8|100000|64\nmain*|(null)|900000|64\n")
    with pytest.raises(
        UserError, match=r"^9B asks for 192 GiB of memory \S+, and .* main with 8 GPUs have at most 98 "
    ):
        check(root, capsys, {"convert": "main", "train": "main"})


@pytest.mark.parametrize(
    "tool", ["exit 1", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2", None]
)
def test_preflight_says_so_if_slurm_lists_no_nodes(root, sinfo, capsys, tool, monkeypatch):
    if tool is None:
        monkeypatch.setenv("PATH", str(sinfo.parent / "nothing"))
    else:
        sinfo.write_text(f"#!/bin/sh\n{tool}\n")
    said = check(root, capsys, {"convert": None, "train": None})
    assert said == "preflight: the nodes of Slurm's default partition were not checked, since sinfo names none\n"
