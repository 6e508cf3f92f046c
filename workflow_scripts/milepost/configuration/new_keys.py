"""Compare recorded settings with today's although keys have been added since: a result stays fresh, and a run goes on.

An earlier version of the pipeline computed without a key what a key at its default computes now.
"""

from typing import Any

from pydantic_core import to_jsonable_python

from milepost.configuration.schema import Dataset, Model, Reward, Section
from milepost.configuration.section import section_of

# Parts of records whose names are not those of sections.
OTHER_NAMES = {"dataset": Dataset, "validation_reward": Reward}
BY_DATA_SET = {"reward_of": Reward}


def with_new_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings ``before``, with the keys of ``now`` that they lack and that have their defaults.

    Both are mappings of plain JSON by section, as in a record of `Provenance` or in run.json.
    """
    known = {name: section_of(field.annotation) for name, field in Model.model_fields.items()} | OTHER_NAMES

    def completed(name: str, content: Any) -> Any:
        if kind := BY_DATA_SET.get(name):
            others = now.get(name, {})
            return {dataset: _completed(kind, part, others.get(dataset)) for dataset, part in content.items()}
        return _completed(known.get(name), content, now.get(name))

    return {name: completed(name, content) for name, content in before.items()}


def _completed(kind: type[Section] | None, before: Any, now: Any) -> Any:
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [_completed(kind, *parts) for parts in zip(before, now, strict=True)]
    if kind is None or not isinstance(before, dict) or not isinstance(now, dict):
        return before
    result = dict(before)
    for name, field in kind.model_fields.items():
        if name in before:
            result[name] = _completed(section_of(field.annotation), before[name], now.get(name))
        elif name in now and not field.is_required() and now[name] == to_jsonable_python(field.default):
            result[name] = now[name]
    return result
