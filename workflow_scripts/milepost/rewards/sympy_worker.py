"""The confined process in which sympy compares two answers: `python -P -m milepost.rewards.sympy_worker`.

One JSON line in, one word out: ``equal``, ``different`` or ``error``. The first word, once sympy is imported, is
``ready``, or ``unfiltered`` where the kernel takes no seccomp filter. See `rewards.confinement` for what the process
may do; it is killed from outside when a question takes too long.
"""

import json
import logging
import os
import sys
from typing import Any

from milepost.rewards.comparison import Item, Statement, same_statement
from milepost.rewards.confinement import confine, limit_seconds

WARM_UP = [  # imports and first uses, outside of any question's time
    (("root", ("add", ("number", 4, 1), ("root", ("number", 12, 1), ("number", 2, 1))), ("number", 2, 1)),
     ("add", ("number", 1, 1), ("root", ("number", 3, 1), ("number", 2, 1)))),
    (("add", ("symbol", "x"), ("number", 1, 1)), ("add", ("number", 1, 1), ("symbol", "x"))),
]  # fmt: skip


def main() -> None:
    from milepost.rewards.symbolic import (
        equal,  # here: whoever imports this script only to name it need not wait for sympy
    )

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is not an answer
    logging.disable(logging.CRITICAL)
    for one, other in WARM_UP:
        equal(one, other)
    print("ready" if confine() else "unfiltered", file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        limit_seconds(question["max_seconds"])
        try:
            same = same_statement(_statement(question["label"]), _statement(question["answer"]), equal)
            print("equal" if same else "different", file=answers)
        except Exception:  # of sympy or the lack of memory: the parent counts it as a grading error
            print("error", file=answers)


def _statement(loaded: list) -> Statement:
    items, between = _tuples(loaded)
    return Statement(tuple(Item(*item) for item in items), between)


def _tuples(loaded: Any) -> Any:
    """A tree again of what JSON made lists."""
    return tuple(map(_tuples, loaded)) if isinstance(loaded, list) else loaded


if __name__ == "__main__":
    main()
