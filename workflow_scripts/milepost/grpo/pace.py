"""How long a run has still to go, estimated from what its own steps, validations and checkpoints took."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

LAST_STEPS = 20  # enough for a steady median, few enough to follow responses that grow longer
LAST_OTHERS = 3  # validations and checkpoints, which are rare


class Pace:
    """The durations of a run's latest steps, and the rollouts, validations and checkpoints that it still owes.

    Medians, so that a restarted engine or a first step that compiles kernels does not count.
    """

    def __init__(self, rollouts: int, validation_interval: int, save_interval: int) -> None:
        self.rollouts, self.validation_interval, self.save_interval = rollouts, validation_interval, save_interval
        self.done, self.validated = 0, -1
        self.took = {
            "seconds_step": deque(maxlen=LAST_STEPS),
            "seconds_validation": deque(maxlen=LAST_OTHERS),
            "seconds_save": deque(maxlen=LAST_OTHERS),
        }

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a line of metrics.jsonl."""
        self.done = max(self.done, row["rollout"])
        if "validation_average" in row:
            self.validated = row["rollout"]
        for name, seconds in self.took.items():
            if row.get(name) is not None:
                seconds.append(row[name])

    def seconds_left(self) -> float | None:
        """The estimate; None before the first step.

        What has not happened yet, such as the first checkpoint, counts as 0.
        """
        if not self.took["seconds_step"]:
            return None
        owed = {
            "seconds_step": self.rollouts - self.done,
            "seconds_validation": self._validations(),
            "seconds_save": -(-self.rollouts // self.save_interval) - self.done // self.save_interval,
        }
        return sum(number * median(self.took[name]) for name, number in owed.items() if self.took[name])

    def _validations(self) -> int:
        """How many validations are left: one every interval, also of the weights that are there now."""
        if not self.validation_interval:
            return 0
        is_due = self.done % self.validation_interval == 0 and self.validated != self.done
        return self.rollouts // self.validation_interval - self.done // self.validation_interval + is_due
