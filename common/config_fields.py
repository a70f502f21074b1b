"""Building blocks of config sections."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Settings of a config section: unknown options are errors, and a field's docstring is its help."""


class ChangeableOnResume:
    """Mark of options that may differ when a run is resumed: they do not change what is learned."""


CHANGEABLE = ChangeableOnResume()


def changeable_options(section: type, prefix: str = "") -> Iterable[str]:
    """Yield the dotted names of the options and sections that are marked CHANGEABLE."""
    hints = get_type_hints(section, include_extras=True)
    for item in fields(section):
        name = prefix + item.name
        hint = hints[item.name]
        if is_changeable(hint):
            yield name
            continue
        option_type = plain_type(hint)
        if is_dataclass(option_type):
            yield from changeable_options(cast(type, option_type), f"{name}.")


def is_changeable(hint: Any) -> bool:
    """Return whether a type is annotated as CHANGEABLE."""
    if get_origin(hint) is not Annotated:
        return False
    _, *annotations = get_args(hint)
    return CHANGEABLE in annotations


def plain_type(hint: Any) -> Any:
    """Return the type without its annotations."""
    if get_origin(hint) is not Annotated:
        return hint
    own_type, *_ = get_args(hint)
    return own_type
