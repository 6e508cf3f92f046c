"""Faults that a user can mend end in one line, not in a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

USER_ERROR = 65  # exit status (sysexits' EX_DATAERR) of a script that a user's mistake ended: a retry does not help


class UserError(Exception):
    """A fault whose message says in one line what was wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a name that it quotes may hold line breaks


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` was caused by a full disk or quota, also where a library gives the message alone, no errno."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def run(main: Callable[[], None]) -> None:
    """Call an entry script's ``main``; a `UserError` or a full disk becomes one line and the exit status `USER_ERROR`.

    The line goes to the file that JOB_ERROR names, for the workflow to show when all jobs have ended, else to stderr.

    Of several processes that torchrun started on a machine only the first to fail says its line. The others often fail
    in the same way, or, since that one has left, in a collective: a RuntimeError, whose traceback would hide the line.
    """
    try:
        main()
    except UserError as error:
        _end(f"error: {error}")
    except Exception as error:
        if is_disk_full(error):
            where = getattr(error, "filename", None) or "the results folder"
            _end(f"error: {where}: the disk is full: make room and run again")
        if isinstance(error, RuntimeError) and (told := _told()) and told.exists():
            sys.exit(USER_ERROR)
        raise


def _end(line: str) -> NoReturn:
    """End with ``line``, unless another process of this launch has said one."""
    if told := _told():
        try:
            told.touch(exist_ok=False)
        except FileExistsError:
            sys.exit(USER_ERROR)
    if error := os.environ.get("JOB_ERROR"):
        with contextlib.suppress(OSError):  # a full disk, say
            Path(error).write_text(f"{line}\n")
            sys.exit(USER_ERROR)
    below_the_bar = "\n" if os.environ.get("RANK", "0") != "0" else ""  # the first process's progress bar
    print(f"{below_the_bar}{line}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _told() -> Path | None:
    """The file that stands for a line said, in the folder that torchrun gives its processes; None without torchrun."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder of the launch>/<process>/error.json
    folder = own and Path(own).parents[1]
    return folder / "told" if folder and folder.is_dir() else None
