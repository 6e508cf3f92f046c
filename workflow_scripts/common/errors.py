"""Faults that a user can mend end in one line, not in a traceback."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """A fault whose message says in one line what was wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a name that it quotes may hold line breaks


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` was caused by a full disk or quota, also where a library gives the message alone, no errno."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def run(main: Callable[[], None]) -> None:
    """Call an entry script's ``main``; a `UserError` or a full disk becomes one line on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None) or "the results folder"
        sys.exit(f"error: {where}: the disk is full: make room and run again")
