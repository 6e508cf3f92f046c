"""The confined process in which math-verify compares two expressions. Run as a script; it imports nothing of ours.

One JSON line in, one word out: ``equal``, ``different`` or ``error``. The first word, ``ready``, comes once math-verify
is imported. The process has a bound on its memory and, for each question, on its processor time, writes no files,
starts no processes, and is killed from outside when a question takes too long.
"""

import json
import logging
import os
import resource
import sys

MEMORY_BYTES = 2**30


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is not an answer
    logging.disable(logging.CRITICAL)
    same_number("\\sqrt{3} + 1", "\\sqrt{4 + 2 \\sqrt{3}}")  # import and warm up outside of any question's time
    same_expression("x + 1", "x + 2")
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    print("ready", file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(usage.ru_utime + usage.ru_stime + question["max_seconds"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        compare = same_number if question["closed"] else same_expression
        try:
            print("equal" if compare(question["label"], question["answer"]) else "different", file=answers)
        except Exception:  # of antlr, sympy or the lack of memory: the parent counts it as a grading error
            print("error", file=answers)


def parse(latex: str) -> list:
    """What math-verify makes of one LaTeX answer: a list with one sympy object, or empty."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex

    boxed = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse_latex(f"\\boxed{{{latex}}}", boxed, fallback_mode="no_fallback", parsing_timeout=None)


def same_number(label: str, answer: str) -> bool:
    """Whether two closed forms are exactly the same number; math-verify itself would round to six decimals."""
    import sympy

    values = [parsed[0].doit() for text in (label, answer) if (parsed := parse(text))]
    if len(values) != 2 or any(not isinstance(value, sympy.Expr) or value.free_symbols for value in values):
        return False
    difference = values[0] - values[1]
    if abs(difference.evalf(50)) > 1e-40:
        return False
    return sympy.simplify(difference) == 0


def same_expression(label: str, answer: str) -> bool:
    """Whether math-verify holds two expressions, sets, intervals, matrices ... for the same."""
    from math_verify import verify

    return verify(parse(label), parse(answer), float_rounding=12, timeout_seconds=None)


if __name__ == "__main__":
    main()
