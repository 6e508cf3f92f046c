"""Faults that a user can mend end in one line, not in a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A fault whose message says in one line what was wrong, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Call an entry script's ``main``; a `UserError` or a full disk becomes one line on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (28, 122):  # ENOSPC, EDQUOT
            raise
        sys.exit(f"error: {error.filename or 'the results folder'}: {error.strerror}: make room and run again")
