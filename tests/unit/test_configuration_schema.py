"""The schema describes every key, matches the shipped files, and repeats none of their values."""

import json
from typing import get_args

import jsonschema
import pytest
import yaml

from milepost.configuration.json_schema import derived
from milepost.configuration.loading import SHARED
from milepost.configuration.schema import Dataset, Model, Plots, Reward, Root, Section, Speculation, WarmUp

SHIPPED = ("0.8B", "2B", "4B", "9B", "27B", "35B_A3B", "tiny", "tiny_gpu", "tiny_moe")


def test_schemas_and_key_tables_are_up_to_date():
    stale = [str(path) for path, content in derived().items() if path.read_text(encoding="utf-8") != content]
    assert not stale, "run `make schema`"


def every_section():
    """Each section of the configuration once, with those in lists, mappings and alternatives."""
    waiting, seen = [Root, Model], []
    while waiting:
        section = waiting.pop()
        if section not in seen:
            seen.append(section)
            waiting += [part for field in section.model_fields.values() for part in sections_in(field.annotation)]
    return seen


def sections_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for option in get_args(annotation) for section in sections_in(option)]


def test_every_value_is_written_in_one_place(root):
    """A value in config.yaml is no default of the schema, too, and a model's file repeats neither of them."""
    shared = yaml.safe_load((root / "config/config.yaml").read_text())
    fields, twice = {**Root.model_fields, **Model.model_fields}, []
    for name in (*SHARED, "plots"):
        (section,) = sections_in(fields[name].annotation)
        if section is not Reward:
            twice += [f"{name}.{key}" for key in shared.get(name, {}) if not section.model_fields[key].is_required()]
    for model in SHIPPED:
        own = yaml.safe_load((root / f"config/models/{model}.yaml").read_text())
        for name in SHARED:
            (section,) = sections_in(fields[name].annotation)
            for key, value in own.get(name, {}).items():
                if value == shared.get(name, {}).get(key, section.model_fields[key].get_default()):
                    twice.append(f"{model}: {name}.{key}")
    assert not twice


def test_every_key_and_every_section_has_a_description():
    assert {WarmUp, Speculation, Dataset, Plots} <= set(every_section())
    silent = [section.__name__ for section in every_section() if not section.__doc__]
    for section in every_section():
        silent += [f"{section.__name__}.{key}" for key, field in section.model_fields.items() if not field.description]
    assert not silent


def test_the_shipped_files_satisfy_the_schemas_for_editors(root):
    shared = json.loads((root / "config/schema.json").read_text())
    jsonschema.validate(yaml.safe_load((root / "config/config.yaml").read_text()), shared)
    model = json.loads((root / "config/models/schema.json").read_text())
    for file in (root / "config/models").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(file.read_text()), model)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"optimizer": {"lr": 1}}, shared)
