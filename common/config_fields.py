"""Building blocks of config sections."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

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
        hint, name = hints[item.name], f"{prefix}{item.name}"
        if get_origin(hint) is Annotated and CHANGEABLE in get_args(hint)[1:]:
            yield name
        elif is_dataclass(plain_type(hint)):
            yield from changeable_options(plain_type(hint), f"{name}.")


def plain_type(hint: Any) -> Any:
    """Return the type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
