"""The base class of all sections, and the types of values that several sections share."""

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    """A part of the configuration. Unknown keys and numbers that are not finite are errors; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, be it in a mapping, a list or one of several alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for option in get_args(annotation) if (section := section_of(option))), None)


Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME)]


def _keeps_a_token(top_k: int) -> int:
    if top_k == 0:
        raise ValueError("0 leaves no token to choose: -1 leaves all")
    return top_k


TopK = Annotated[int, Field(ge=-1), AfterValidator(_keeps_a_token)]


def _without_repeats(values: list) -> list:
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise ValueError(f"{', '.join(map(str, twice))}: given twice")
    return values


EachOnce = AfterValidator(_without_repeats)
# One name or several: told apart by the value's type, so that an error is about what the user meant.
Names = Annotated[
    Annotated[Name, Tag("name")] | Annotated[list[Name], EachOnce, Field(min_length=1), Tag("names")],
    Discriminator(lambda given: "names" if isinstance(given, list) else "name"),
]


def _is_color(value: str) -> str:
    if not re.fullmatch("#[0-9A-Fa-f]{6}", value):
        from matplotlib.colors import is_color_like  # takes a while to import

        if not is_color_like(value):
            raise ValueError("no colour: give one like '#0b7285' or 'teal' (matplotlib's names)")
    return value


Color = Annotated[str, AfterValidator(_is_color)]
