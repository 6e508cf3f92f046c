"""Durations for people."""

from itertools import pairwise

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as ``2 d 3 h`` and ``4 min 10 s``; below 10 s with two digits."""
    if seconds < 0.01:
        return "< 0.01 s"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    left = round(seconds)
    for (unit, size), (smaller, part) in pairwise(UNITS):
        whole, rest = divmod(round(left / part), size // part)
        if whole:
            return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"
    return f"{left} s"
