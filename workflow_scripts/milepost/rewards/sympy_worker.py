"""The confined process in which sympy compares two answers: `python -P -m milepost.rewards.sympy_worker`.

It reads JSON lines and answers each with a word: ``equal``, ``different`` or ``error``. The first word, once sympy is
imported, is ``ready``, or ``unfiltered`` if the kernel supports no seccomp filter. `rewards.confinement` restricts what
the process may do; the parent kills it when a question takes too long.
"""

import json
import logging
import os
import sys
from typing import Any

from milepost.rewards.comparison import Item, Statement, same_statement
from milepost.rewards.confinement import confine, limit_seconds

WARM_UP = [  # imports and first uses, outside any question's time limit
    (("root", ("add", ("number", 4, 1), ("root", ("number", 12, 1), ("number", 2, 1))), ("number", 2, 1)),
     ("add", ("number", 1, 1), ("root", ("number", 3, 1), ("number", 2, 1)))),
    (("add", ("symbol", "x"), ("number", 1, 1)), ("add", ("number", 1, 1), ("symbol", "x"))),
]  # fmt: skip


def main() -> None:
    from milepost.rewards.symbolic import (
        equal,  # imported here, so that importing this module only for its name does not import sympy
    )

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing a library prints is taken for an answer
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
        except Exception:  # sympy's, or out of memory: the parent counts it as a grading error
            print("error", file=answers)


def _statement(loaded: list) -> Statement:
    items, between = _tuples(loaded)
    return Statement(tuple(Item(*item) for item in items), between)


def _tuples(loaded: Any) -> Any:
    """The tree, of which JSON made lists, as tuples again."""
    return tuple(map(_tuples, loaded)) if isinstance(loaded, list) else loaded


if __name__ == "__main__":
    main()
