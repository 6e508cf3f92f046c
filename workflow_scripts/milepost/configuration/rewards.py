"""The keys of a reward: a built-in kind, a user's function, or a weighted sum of such parts.

A model has one reward (``reward``); a data set's own reward replaces it for that set.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from milepost.configuration.section import Positive, Section

Kind = Literal["math", "choice", "exact"]
Labels = Literal["math", "choice", "exact", "any"]
ThinkBlock = Literal["required", "optional"]
FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")
TAKEN = {"mean", "min", "max"}  # reward_mean is of the whole reward


class Function(NamedTuple):
    """A user's reward: a file and the name of a function in it."""

    file: str
    name: str

    @property
    def path(self) -> Path:
        """The file's path, relative to where Snakemake runs."""
        return Path(self.file).expanduser().absolute()

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


class Rule(Section):
    """One rule by which responses are graded: a built-in kind or a function."""

    kind: Kind | None = Field(
        None,
        description="math: the one boxed answer is the label's; choice: one letter, in a box or after `Answer:`; exact:"
        " the whole answer is the label's text",
    )
    function: str | None = Field(
        None, description="a function of your own, `file.py:name`; the file's path starts where Snakemake runs"
    )
    trim: bool = Field(True, description="exact: ignore white space at both ends")
    fold_case: bool = Field(True, description="exact: ignore upper and lower case")
    batch: bool = Field(False, description="function: it takes a list of samples and returns a list")

    ways: ClassVar[tuple[str, ...]] = ("kind", "function")

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str | None) -> str | None:
        if function is not None and not FUNCTION.fullmatch(function):
            raise ValueError("a file and a function in it are expected, such as my_rewards.py:my_function")
        return function

    @model_validator(mode="after")
    def _is_one_rule(self) -> Self:
        given = [way for way in self.ways if getattr(self, way) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.ways)}; given: {', '.join(given) or 'none'}")
        if self.kind != "exact":
            self._refuse(("trim", "fold_case"), "kind: exact")
        if not self.function:
            self._refuse(("batch",), "a function")
        return self

    @property
    def where(self) -> Function:
        """The function's file and name."""
        return Function(**FUNCTION.fullmatch(self.function).groupdict())

    def _refuse(self, keys: tuple[str, ...], owner: str) -> None:
        """Raise a `ValueError` for the first of ``keys`` that differs from its default: only ``owner`` reads it."""
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for {owner} alone: remove it here")


class Part(Rule):
    """One part of a sum."""

    weight: float = Field(1.0, description="what the part's reward is multiplied by")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z]\w*$",
        description="of its metric, reward_NAME; where none is given the kind or the function's name",
    )

    @property
    def title(self) -> str:
        return self.name or self.kind or self.where.name


class Reward(Rule):
    """How responses are graded; by default the kind math."""

    sum: Annotated[list[Part], Field(min_length=1)] | None = Field(
        None, description="weighted parts, such as [{kind: math}, {function: my_rewards.py:brief, weight: 0.1}]"
    )
    think_block: ThinkBlock = Field(
        "required",
        description="required: only text after the reasoning's </think> counts; optional: all of it where there is"
        " none, as under enable_thinking: false",
    )
    max_seconds: Positive = Field(5.0, description="time that grading one answer, or one call of a function, may take")
    retries: Annotated[int, Field(ge=0)] = Field(0, description="function: further attempts after an error")
    processes: PositiveInt = Field(4, description="function: worker processes side by side, at most")
    memory_gib: Positive = Field(4.0, description="function: memory of one worker process")
    on_error: float = Field(0.0, description="function: the reward of a sample whose grading failed")
    max_error_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="function: a larger share of failed samples in a rollout or an evaluation ends the run"
    )
    correct_from: float = Field(1.0, description="the reward from which a sample is correct, for pass@k and maj@k")

    ways = ("kind", "function", "sum")

    @model_validator(mode="before")
    @classmethod
    def _is_math_by_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and all(given.get(way) is None for way in cls.ways):
            return given | {"kind": "math"}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        titles = [part.title for part in self.sum or ()]
        for title in titles:
            if title in TAKEN or titles.count(title) > 1:
                raise ValueError(f"the name {title!r} is taken: give that part of the sum another one (name: ...)")
        if not self.functions:
            self._refuse(("retries", "processes", "memory_gib", "on_error", "max_error_share"), "a function")
        return self

    @property
    def parts(self) -> list[Part]:
        """The parts of the sum; a reward that is not a sum is its only part, with weight 1."""
        return self.sum or [Part(**{name: getattr(self, name) for name in Rule.model_fields})]

    @property
    def functions(self) -> list[Function]:
        """The users' functions in it."""
        return [rule.where for rule in (self, *(self.sum or ())) if rule.function]

    @property
    def labels(self) -> Labels:
        """How to read labels, a name in `common.labels.READERS`: as its strictest part needs them."""
        kinds = {part.kind for part in self.parts}
        return next((kind for kind in ("math", "choice", "exact") if kind in kinds), "any")

    @property
    def is_share(self) -> bool:
        """Whether every reward is 0 or 1, so that their mean is a share."""
        return self.kind is not None
