"""The process in which a user's reward runs: `python -P -m milepost.rewards.user_worker FILE NAME BATCH BYTES`.

It answers each JSON line, the samples of one call, with a line: a list with ``{"reward", "reason"}`` or ``{"error"}``
for each sample. Before that, its first line says whether the file could be loaded. What the function prints goes to the
job's log.
"""

import importlib.util
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from milepost.rewards.base import Response

GRACE_SECONDS = 5  # after the time limit: then the kernel ends the call, in case the parent is gone
LARGEST = 1e30  # the largest reward: beyond it a group's standard deviation overflows
LONGEST = 500  # the most characters of an error or a reason


def main() -> None:
    file, name, batch, memory_bytes = sys.argv[1:]
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function = load(Path(file), name)
    except BaseException as error:
        print(json.dumps({"error": describe(error, file)}), file=answers)
        return
    print(json.dumps({}), file=answers)
    for line in questions:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["max_seconds"] + GRACE_SECONDS)
        try:
            given = call(function, [Response(**sample) for sample in question["samples"]], batch == "True")
        except BaseException as error:
            given = [{"error": describe(error, file)}] * len(question["samples"])
        print(json.dumps(given), file=answers)
        signal.setitimer(signal.ITIMER_REAL, 0)


def load(file: Path, name: str) -> Callable[..., Any]:
    """Import a user's file, with its folder on the path as if it were run, and return a function of it."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def call(function: Callable[..., Any], samples: list[Response], batch: bool) -> list[dict[str, Any]]:
    """The function's outcome for each sample."""
    if not batch:
        return [outcome(function(samples[0]))]
    given = function(samples)
    if not isinstance(given, list | tuple) or len(given) != len(samples):
        found = f"{len(given)} values" if isinstance(given, list | tuple) else type(given).__name__
        raise TypeError(f"a list of {len(samples)} rewards is expected, not {found}")
    return [outcome(value) for value in given]


def outcome(value: Any) -> dict[str, Any]:
    """Check what the function returned: a reward, or a reward and a reason."""
    reward, reason = value if isinstance(value, tuple) and len(value) == 2 else (value, "")
    if not isinstance(reward, Real) or not isinstance(reason, str):
        return {"error": f"TypeError: a number, or a number and a text, is expected, not {short(value)}"}
    if not abs(reward) <= LARGEST:  # nor is NaN
        return {"error": f"ValueError: a finite number is expected, not {short(value)}"}
    return {"reward": float(reward), "reason": reason[:LONGEST]}


def describe(error: BaseException, file: str) -> str:
    """An error in one line, with its line number in the user's file."""
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return " ".join(said[:LONGEST].split()) + (f" ({Path(file).name}, line {lines[-1]})" if lines else "")


def short(value: Any) -> str:
    return repr(value)[:80]


if __name__ == "__main__":
    main()
