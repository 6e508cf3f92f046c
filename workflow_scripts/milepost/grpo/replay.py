"""Train on saved rollouts, without an engine: to compare losses on the same data, or to find a fault."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from milepost.common.errors import UserError
from milepost.configuration.runs import saved_rollouts
from milepost.grpo.data import Prompt, PromptCursor
from milepost.grpo.groups import Group, read_groups
from milepost.grpo.sampler import samples_of
from milepost.grpo.samples import Rollout, to_training
from milepost.grpo.settings import Settings


class NoEngine:
    """What the training loop asks of an engine, for a training that needs none."""

    weights_wanted: Callable[[], None] | None = None

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Replay:
    """Hands out the rollouts of another run, with advantages by this run's settings, in the place of a `Sampler`.

    Attributes:
        folder: of that run.
        prompts: those of each training set, by its name.
        cursor: of the run state; it stays where it is.
    """

    settings: Settings
    folder: Path
    prompts: Mapping[str, Sequence[Prompt]]
    cursor: PromptCursor
    engine: NoEngine
    waiting: tuple[Group, ...] = ()

    def draw(self, number: int) -> Rollout:
        """Read rollout ``number``, from 1; `UserError` if it was not saved or is of another size."""
        file = saved_rollouts(self.folder, number)[-1]
        if not file.exists():
            raise UserError(f"{file}: no such rollout: lower training.rollouts to those that training.replay holds")
        groups, training = read_groups(file, self.prompts), self.settings.training
        sizes = (len(groups), *{len(group.answers) for group in groups})
        if sizes != (training.prompts_per_rollout, training.samples_per_prompt):
            raise UserError(
                f"{file}: holds {' x '.join(map(str, sizes))} samples: set training.prompts_per_rollout and"
                " training.samples_per_prompt to these numbers"
            )
        # Only the first rollout was sampled by the very weights that it trains here, unless all settings are the same.
        samples = samples_of(groups, version=0 if number == 1 else number)
        return Rollout(samples, samples, to_training(samples, self.settings), flow={}, seconds={})
