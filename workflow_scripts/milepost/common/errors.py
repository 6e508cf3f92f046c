"""Faults that a user can mend end in one line, not in a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

USER_ERROR = 65  # exit status (sysexits' EX_DATAERR) of a script that a user's mistake ended: a retry does not help
# The environment variable by which a launcher names a private folder to its processes, and the file there that holds
# the line to end with.
LAUNCH, TOLD = "MILEPOST_LAUNCH", "error"


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

    Of several processes the first to fail leaves its line to their launcher, which says it when all have ended. The
    others often fail in the same way, or, since that one has left, in a collective: a RuntimeError, whose traceback
    would hide the line.
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
    """End with ``line``; one of several processes leaves it to their launcher, which says the first."""
    if told := _told():
        with contextlib.suppress(FileExistsError), told.open("x") as file:
            file.write(line)
        sys.exit(USER_ERROR)
    end(line)


def end(line: str) -> NoReturn:
    """End a job with ``line``: left for the workflow where it asks for that, else on stderr."""
    if error := os.environ.get("JOB_ERROR"):
        with contextlib.suppress(OSError):  # a full disk, say
            Path(error).write_text(f"{line}\n")
            sys.exit(USER_ERROR)
    print(line, file=sys.stderr)
    sys.exit(USER_ERROR)


def _told() -> Path | None:
    """The file by which the processes of a launcher leave it the line to end with; None without a launcher."""
    folder = os.environ.get(LAUNCH)
    return Path(folder, TOLD) if folder else None
