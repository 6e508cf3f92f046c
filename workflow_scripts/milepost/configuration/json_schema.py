"""Write what is derived from schema.py: the JSON schemas for editors, and the tables of keys in config/README.md.

``make schema`` runs it; a test fails while those are out of date.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from milepost.common.files import atomic_write
from milepost.configuration.layers import read_yaml
from milepost.configuration.loading import SHARED
from milepost.configuration.rewards import Part
from milepost.configuration.schema import Model, Root
from milepost.configuration.section import section_of

CONFIG = Path(__file__).resolve().parents[3] / "config"
MARK = "<!-- everything below is written by `make schema` -->\n"


def derived() -> dict[Path, str]:
    """Path -> content of every derived file."""
    readme = CONFIG / "README.md"
    return {
        CONFIG / "schema.json": _dump(_shared_schema()),
        CONFIG / "models" / "schema.json": _dump(_optional(Model.model_json_schema())),
        readme: readme.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + _tables(),
    }


def _shared_schema() -> dict[str, Any]:
    """The schema of config.yaml: the keys of `Root`, and the sections that all models share."""
    root, model = _optional(Root.model_json_schema()), _optional(Model.model_json_schema())
    root["properties"] |= {name: model["properties"][name] for name in SHARED}
    root["$defs"] |= model["$defs"]
    return root


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """Make every key optional: a file may leave out what another one has."""
    for part in [schema, *schema.get("$defs", {}).values()]:
        part.pop("required", None)
    return schema


def _tables() -> str:
    fields = {**Root.model_fields, **Model.model_fields}
    top = {name: section for name, field in fields.items() if (section := section_of(field.annotation))}

    def tables(name: str, section: type[BaseModel]) -> list[str]:
        """The table of a section, and of those within it that have none of their own."""
        lines = _table(name, section)
        for key, field in section.model_fields.items():
            if (inner := section_of(field.annotation)) and inner not in top.values():
                lines += tables(f"{name}.{key}", inner)
        return lines

    lines = [line for name, section in {"config.yaml": Root, **top}.items() for line in tables(name, section)]
    return "\n".join([*lines, *_table("a part of reward.sum", Part)]) + "\n"


def _table(title: str, section: type[BaseModel]) -> list[str]:
    """The Markdown table of a section: key, type, default, description."""
    properties, shared = section.model_json_schema()["properties"], read_yaml(CONFIG / "config.yaml")
    given, rows = shared if section is Root else shared.get(title, {}), []
    for name, field in section.model_fields.items():
        if section_of(field.annotation) is not None:
            default = "see below"
        elif not field.is_required():
            default = f"`{json.dumps(properties[name].get('default'))}`"
        else:
            default = "in config.yaml" if name in given else "required"
        rows.append(f"| `{name}` | {_type(properties[name])} | {default} | {field.description or ''} |")
    about = [section.__doc__.split("\n")[0], ""] if section.__doc__ else []
    return [f"### {title}", "", *about, "| key | type | default | |", "|---|---|---|---|", *rows, ""]


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(map(_type, options)).replace("null", "none")
    if "$ref" in schema:
        return f"section {schema['$ref'].rsplit('/', 1)[1]}"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}" if "items" in schema else "list"
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = ", ".join(f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema)
    return schema.get("type", "any") + (f" {limits}" if limits else "")


def _dump(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path, content in derived().items():
        atomic_write(path, content)
