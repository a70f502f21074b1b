"""Writes docs/options.md from the config: every option with its type, default, range and help."""

import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from training.config import SCHEMA, TrainConfig  # noqa: E402

HEAD = """# Options

Generated from the config by `make docs`; do not edit. Options stand on the command line (`--optim.eps 1e-6`) or in
a recipe:

```yaml
steps: 100
optim:
  eps: 1e-6
```

`data.sources` and `adapter.overrides` are lists, which stand in a recipe alone:

```yaml
adapter:
  overrides:
    - {pattern: "mid_block.*", rank: 32}
    - {pattern: "conv_out", algorithm: Full}
```

The command line beats the recipe, the recipe beats the defaults. Choices are case-insensitive. Switches are written
`--export.merged_model` and `--export.no_merged_model`, or with `true` and `false`.
"""


def main() -> None:
    (PROJECT / "docs" / "options.md").write_text(options_page(), encoding="utf-8")


def options_page() -> str:
    """The page, from the JSON schema of the config."""
    schema = SCHEMA.json_schema()
    definitions = schema["$defs"]
    root, sections = [], []
    hints = typing.get_type_hints(TrainConfig)
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = definitions[field["$ref"].split("/")[-1]]
            describe_inherited(hints[name], section["properties"])
            sections.append(
                table(f"## {name}\n\n{section['description']}", section["properties"], f"{name}.")
            )
            sections += tables_of_lists(name, section["properties"], definitions)
        else:
            root.append(name)
    first = table("## Root options", {name: schema["properties"][name] for name in root}, "")
    return "\n".join([HEAD, first, *sections])


def tables_of_lists(
    section: str, properties: dict[str, Any], definitions: dict[str, Any]
) -> list[str]:
    """The options of what stands in the lists of a section."""
    tables = []
    for name, field in properties.items():
        if "$ref" in field.get("items", {}):
            item = definitions[field["items"]["$ref"].split("/")[-1]]
            title = f"### In the list {section}.{name}\n\n{item['description']}"
            tables.append(table(title, item["properties"], ""))
    return tables


def describe_inherited(cls: type, properties: dict[str, Any]) -> None:
    """Adds the help of inherited options: pydantic reads the docstrings of a class's own fields
    only."""
    for base in cls.__mro__[1:]:
        if is_dataclass(base):
            for name, field in TypeAdapter(base).json_schema()["properties"].items():
                properties[name].setdefault("description", field["description"])


def table(title: str, fields: dict[str, Any], prefix: str) -> str:
    """One table of options."""
    rows = [
        f"| `{prefix}{name}` | {type_of(field)} | {default_of(field)} | {help_of(field)} |"
        for name, field in fields.items()
    ]
    return "\n".join(
        [title, "", "| option | values | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def help_of(field: dict[str, Any]) -> str:
    return " ".join(field["description"].split()).replace("<", "&lt;")


def type_of(field: dict[str, Any]) -> str:
    """A field's values in words: choices, a range, or a type."""
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(
            "none" if arm.get("type") == "null" else type_of(arm) for arm in field["anyOf"]
        )
    if "$ref" in field:
        return "the options below"
    if field["type"] == "array":
        items = field.get("items") or field["prefixItems"][0]
        count = f"{len(field['prefixItems'])} of " if "prefixItems" in field else "list of "
        return count + type_of(items)
    return {"string": "text", "boolean": "switch", "integer": "whole number", "number": "number"}[
        field["type"]
    ] + bounds_of(field)


def bounds_of(field: dict[str, Any]) -> str:
    parts = []
    for key, words in (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
    ):
        if key in field:
            value = field[key]
            parts.append(f"{words} {'2^64 - 1' if value == 2**64 - 1 else f'{value:g}'}")
    return f" {' '.join(parts)}" if parts else ""


def default_of(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "required"
    value = field["default"]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(f"`{v}`" for v in value) or "none"
    return f"`{value}`"


if __name__ == "__main__":
    main()
