"""Errors that a user can fix end in one line instead of a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

SHOWN = 6  # names in an error
USER_ERROR = 65  # exit status after a user's mistake (sysexits' EX_DATAERR): a retry would not help
# The environment variable in which a launcher passes a private folder to its processes, and the file in that folder in
# which the first process to fail leaves its error line.
LAUNCH, ERROR_FILE = "MILEPOST_LAUNCH", "error"


class UserError(Exception):
    """An error whose message says in one line what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # quoted names may contain line breaks


def few(names: Sequence[str], separator: str = ", ") -> str:
    """The first of many names, and how many more there are, for an error of one line."""
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk or quota caused ``error``, even if a library passes on only the message, not the errno."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def run(main: Callable[[], None]) -> None:
    """Call an entry script's ``main``; turn a `UserError` or a full disk into one line and exit status `USER_ERROR`.

    The line goes to the file that JOB_ERROR names, which the workflow shows when all jobs have ended, or to stderr.

    Under a launcher, the first process to fail leaves its line for the launcher, which prints it when all have ended.
    The other processes often fail in the same way, or in a collective with the one that left: that RuntimeError is
    suppressed, because its traceback would hide the line.
    """
    try:
        main()
    except UserError as error:
        _end(f"error: {error}")
    except Exception as error:
        if is_disk_full(error):
            where = getattr(error, "filename", None) or "the results folder"
            _end(f"error: {where}: the disk is full: make room and run again")
        if isinstance(error, RuntimeError) and (error_file := _error_file()) and error_file.exists():
            sys.exit(USER_ERROR)
        raise


def _end(line: str) -> NoReturn:
    """Exit with the error ``line``; under a launcher, leave it for the launcher unless another process already has."""
    if error_file := _error_file():
        with contextlib.suppress(FileExistsError), error_file.open("x") as file:
            file.write(line)
        sys.exit(USER_ERROR)
    end(line)


def end(line: str) -> NoReturn:
    """Exit a job with the error ``line``, written to the file that JOB_ERROR names, or to stderr."""
    if error := os.environ.get("JOB_ERROR"):
        with contextlib.suppress(OSError):  # e.g. a full disk
            Path(error).write_text(f"{line}\n")
            sys.exit(USER_ERROR)
    print(line, file=sys.stderr)
    sys.exit(USER_ERROR)


def _error_file() -> Path | None:
    """The file in which processes leave their error line for the launcher; None without a launcher."""
    folder = os.environ.get(LAUNCH)
    return Path(folder, ERROR_FILE) if folder else None
