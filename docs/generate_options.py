"""Writes docs/options.md from the config: every option with its values, default and help."""

import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from pydantic import TypeAdapter  # noqa: E402

from lora_algos.config import AdapterOptions  # noqa: E402
from training.config import SCHEMA  # noqa: E402

HEAD = """# Options

This page is generated from the config by `make docs`; do not edit it. Set options on the command line
(`--optim.eps 1e-6`) or in a recipe:

```yaml
steps: 100
optim:
  eps: 1e-6
```

`data.sources` and `adapter.overrides` are lists of structured entries, which only a recipe can contain:

```yaml
adapter:
  overrides:
    - {pattern: "mid_block.*", rank: 32}
    - {pattern: "conv_out", algorithm: Full}
```

The command line overrides the recipe, and the recipe overrides the defaults. Choices ignore upper and
lower case. Relative paths start at the folder in which you run the command. `{project}` in a path is
the folder of `train_lora.py`. Turn switches on with `--export.merged_model` and off with
`--export.no_merged_model`; `true` and `false` work too.
"""
BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}
TYPES = {"string": "text", "boolean": "switch", "integer": "whole number", "number": "number"}
LARGEST_SEED = 2**64 - 1
Field = dict[str, Any]


def main() -> None:
    (PROJECT / "docs" / "options.md").write_text(options_page(), encoding="utf-8")


def options_page() -> str:
    """Return the page, from the JSON schema of the config."""
    schema = SCHEMA.json_schema()
    definitions = schema["$defs"]
    add_missing_help(definitions)
    root = {name: field for name, field in schema["properties"].items() if "$ref" not in field}
    tables = [options_table("## Root options", root, "")]
    for name, field in schema["properties"].items():
        if "$ref" in field:
            tables += section_tables(name, definition_of(field, definitions), definitions)
    return "\n".join([HEAD, *tables])


def add_missing_help(definitions: Field) -> None:
    """Add the help that pydantic does not find: it reads the docstrings of a class's own fields
    only."""
    inherited = TypeAdapter(AdapterOptions).json_schema()["properties"]
    for name, field in definitions["AdapterConfig"]["properties"].items():
        field.setdefault("description", inherited.get(name, {}).get("description", ""))
    for name, field in definitions["CaptionOverrides"]["properties"].items():
        field["description"] = f"Replaces data.captions.{name} for this source."


def definition_of(field: Field, definitions: Field) -> Field:
    """Return the section that a field refers to."""
    return definitions[field["$ref"].split("/")[-1]]


def section_tables(name: str, section: Field, definitions: Field) -> list[str]:
    """Return the table of a section, and the tables of its subsections and lists."""
    own = {key: field for key, field in section["properties"].items() if "$ref" not in field}
    tables = [options_table(f"## {name}\n\n{section['description']}", own, f"{name}.")]
    for key, field in section["properties"].items():
        if "$ref" in field:
            subsection = definition_of(field, definitions)
            title = f"### {name}.{key}\n\n{subsection['description']}"
            tables.append(options_table(title, subsection["properties"], f"{name}.{key}."))
        elif "$ref" in field.get("items", {}):
            item = definition_of(field["items"], definitions)
            title = f"### In the list {name}.{key}\n\n{item['description']}"
            tables += item_tables(title, item, definitions)
    return tables


def item_tables(title: str, item: Field, definitions: Field) -> list[str]:
    """Return the table of the entries of a list, with the options of their subsections."""
    fields = {}
    for name, field in item["properties"].items():
        if "$ref" in field:
            subsection = definition_of(field, definitions)["properties"]
            fields |= {f"{name}.{key}": subfield for key, subfield in subsection.items()}
        else:
            fields[name] = field
    return [options_table(title, fields, "")]


def options_table(title: str, fields: Field, prefix: str) -> str:
    """Return one table of options."""
    lines = [title, "", "| option | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = [f"`{prefix}{name}`", values_of(field), default_of(field), help_of(field)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def help_of(field: Field) -> str:
    return " ".join(field["description"].split()).replace("<", "&lt;")


def values_of(field: Field) -> str:
    """Return the values of a field in words: choices, a range, or a type."""
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(values_of(option) for option in field["anyOf"])
    if "$ref" in field:
        return "options"
    if field["type"] == "null":
        return "none"
    if field["type"] == "array":
        return values_of_list(field)
    return TYPES[field["type"]] + bounds_of(field)


def values_of_list(field: Field) -> str:
    """Return the values of a list in words."""
    if "prefixItems" in field:
        return f"{len(field['prefixItems'])} of {values_of(field['prefixItems'][0])}"
    return f"list of {values_of(field['items'])}"


def bounds_of(field: Field) -> str:
    """Return the range of a number in words."""
    words = []
    for key, word in BOUNDS.items():
        if key in field:
            number = "2^64 - 1" if field[key] == LARGEST_SEED else f"{field[key]:g}"
            words.append(f" {word} {number}")
    return "".join(words)


def default_of(field: Field) -> str:
    """Return the default of a field."""
    if "$ref" in field:
        return "none"
    if "default" not in field:
        return "required"
    value = field["default"]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(f"`{item}`" for item in value) or "none"
    return f"`{value}`"


if __name__ == "__main__":
    main()
