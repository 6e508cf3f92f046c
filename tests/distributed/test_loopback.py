"""No process of a run can be reached from another machine (SGLang's are watched in tests/gpu/)."""

import subprocess
import sys

import psutil

import grpo_run
from listeners import listeners
from stages import convert_arguments, script, torchrun


def test_two_processes_that_convert_and_train_listen_on_loopback_only(root, tmp_path, environment):
    # As on a cluster, whose settings name its network interface for gloo.
    network = next((name for name in psutil.net_if_addrs() if name != "lo"), "lo")
    environment = environment | {"GLOO_SOCKET_IFNAME": network}
    grpo_run.prepare(tmp_path)
    training, work = str(root / "tests" / "grpo_run.py"), tmp_path / "run"
    for command_line in (
        (script("convert"), *convert_arguments(tmp_path / "download.json", tmp_path / "torch_dist")),
        (training, *grpo_run.arguments(tmp_path, work, training={"rollouts": 1}, hardware={"processes": 2})),
    ):
        with listeners() as seen:
            torchrun(2, *command_line, env=environment)
        assert seen.loopback  # gloo's; sockets on other interfaces would have been seen too
        assert not seen.open, seen.open


def test_a_launcher_that_would_open_ports_is_refused(tmp_path, environment):
    arguments = convert_arguments(tmp_path / "download.json", tmp_path / "torch_dist")
    grpo_run.prepare(tmp_path)
    with listeners() as seen:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             script("convert"), *arguments],
            text=True, capture_output=True, timeout=300, env=environment,
        )  # fmt: skip
    assert seen.open  # torchrun's own
    assert done.returncode and "python -m milepost.launch.torchrun" in done.stderr
    assert not (tmp_path / "torch_dist.json").exists()
