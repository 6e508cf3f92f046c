"""Writes what is derived from schema.py: the JSON schemas for editors, and the table of all keys in config/README.md.

Run by ``make schema``; a test fails while they are out of date.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from milepost.common.files import atomic_write
from milepost.configuration.loading import SHARED
from milepost.configuration.rewards import Part
from milepost.configuration.schema import Model, Root

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
    """config.yaml: the root's own keys and the sections that all models share."""
    root, model = _optional(Root.model_json_schema()), _optional(Model.model_json_schema())
    root["properties"] |= {name: model["properties"][name] for name in SHARED}
    root["$defs"] |= model["$defs"]
    return root


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """No key is required of one file, since files are laid over each other."""
    for part in [schema, *schema.get("$defs", {}).values()]:
        part.pop("required", None)
    return schema


def _tables() -> str:
    lines = _table("config.yaml", Root)
    for name, field in [*Root.model_fields.items(), *Model.model_fields.items()]:
        if section := _section(field.annotation):
            lines += _table(name, section)
    lines += _table("a part of reward.sum", Part)
    return "\n".join(lines) + "\n"


def _table(title: str, section: type[BaseModel]) -> list[str]:
    """One Markdown table: key, default, type, and what the schema says of it."""
    properties = section.model_json_schema()["properties"]
    rows = []
    for name, field in section.model_fields.items():
        default = "" if field.is_required() else f"`{json.dumps(properties[name].get('default'))}`"
        if _section(field.annotation) is not None:
            default = "see below" if title == "config.yaml" else ""
        rows.append(f"| `{name}` | {_type(properties[name])} | {default} | {field.description or ''} |")
    about = [section.__doc__.split("\n")[0], ""] if section.__doc__ else []
    return [f"### {title}", "", *about, "| key | type | default | |", "|---|---|---|---|", *rows, ""]


def _section(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"]).replace("null", "none")
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
