"""A process killed while it writes: a file is complete or absent."""

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from milepost.checkpoints.folders import finish_folder, partial_folder, start_folder
from milepost.common.files import atomic_write

KILLS = 15


def killed_at_random_moments(write: Callable[[str], None], check: Callable[[], None]) -> None:
    """Repeatedly let a process write one version after the other, kill it, and check the result."""
    draw = random.Random(3)
    for round_number in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                for number in range(1000):
                    write(f"{round_number:03d}-{number:03d} ")
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check()


def is_whole(text: str, times: int) -> bool:
    return text == text[:8] * times


@pytest.mark.parametrize("times", [10, 100_000])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, times):
    path = tmp_path / "file"
    atomic_write(path, "000-000 " * times)
    killed_at_random_moments(
        lambda version: atomic_write(path, version * times), lambda: _assert(is_whole(path.read_text(), times))
    )


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "folder"

    def write(version: str) -> None:
        partial = partial_folder(folder)
        start_folder(partial)
        for name in "abc":
            (partial / name).write_text(version * 1000)
        finish_folder(partial, folder)

    def check() -> None:
        if folder.exists():
            contents = {(folder / name).read_text() for name in "abc"}
            assert len(contents) == 1 and is_whole(contents.pop(), 1000)

    killed_at_random_moments(write, check)


def _assert(holds: bool) -> None:
    assert holds
