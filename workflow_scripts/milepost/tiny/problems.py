"""Sums of two two-digit numbers: problem sets that a tiny model can learn, in the format of the real ones.

Whether a pair of operands is for training or evaluation depends only on the pair, not on its order or any seed. So no
choice of seeds or sizes lets a training set or the warm-up contain an evaluation problem.
"""

import random
import zlib
from dataclasses import dataclass

from milepost.common.errors import UserError
from milepost.configuration.schema import Problems

OPERANDS = range(10, 100)
EVALUATION_SHARE = 8  # one in this many unordered pairs is for evaluation


@dataclass(frozen=True)
class Addition:
    """One problem: ``left + right``."""

    left: int
    right: int

    @property
    def split(self) -> str:
        """``train`` or ``evaluation``: depends only on the two operands, not on their order."""
        pair = f"{min(self.left, self.right)}+{max(self.left, self.right)}"
        return "train" if zlib.crc32(pair.encode()) % EVALUATION_SHARE else "evaluation"

    @property
    def question(self) -> str:
        return f"What is {self.left} + {self.right}?"

    @property
    def partial_sums(self) -> tuple[int, int]:
        """The sum of the units and the sum of the tens: 37 + 58 gives 15 and 80."""
        return self.left % 10 + self.right % 10, self.left // 10 * 10 + self.right // 10 * 10

    @property
    def label(self) -> str:
        return str(self.left + self.right)

    def row(self, prompt_key: str, label_key: str) -> dict:
        """The problem as a row of a data set: chat messages and a label."""
        return {prompt_key: [{"role": "user", "content": self.question}], label_key: self.label}


def computed(addition: Addition) -> str:
    """The assistant's text after ``<think>`` and a line break when it computes the sum: 37 + 58 is 15+80."""
    units, tens = addition.partial_sums
    return _response(f"{units}+{tens}", units + tens)


def estimated(addition: Addition) -> str:
    """The assistant's text when it drops the units, which is wrong for 99 sums in 100: 37 + 58 is about 80."""
    _, tens = addition.partial_sums
    return _response(f"~{tens}", tens)


def _response(reasoning: str, result: int) -> str:
    return f"{reasoning}\n</think>\n\nAnswer: \\boxed{{{result}}}"


def all_additions(split: str) -> list[Addition]:
    """Every problem of a split, in order."""
    additions = (Addition(left, right) for left in OPERANDS for right in OPERANDS)
    return [addition for addition in additions if addition.split == split]


def draw(problems: Problems) -> list[Addition]:
    """Draw ``problems.rows`` different problems of a split with its seed; a `UserError` if there are fewer."""
    additions = all_additions(problems.split)
    if problems.rows > len(additions):
        raise UserError(
            f"problems: {problems.rows} rows asked for, the {problems.split} split has {len(additions)}: lower rows"
        )
    return random.Random(problems.seed).sample(additions, problems.rows)
