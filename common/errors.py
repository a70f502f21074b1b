"""Errors that a user can mend, and one message for many of them."""

MAX_LISTED = 20
"""Lines of one message; the rest is counted."""


class UserError(ValueError):
    """A mistake in the input. The program ends with exit code 2 and prints the message without a
    traceback."""


class ConfigError(UserError):
    """Options that are wrong or contradict each other; the message names each with its flag or
    file."""


class DataError(UserError):
    """Images, captions or encoded data that cannot be used; the message lists all of them."""


class ModelError(UserError):
    """A path that holds no supported model, or a model that cannot be loaded."""


class AdapterError(UserError):
    """Targets that match no layer, options that do not fit a layer, or an adapter file that does
    not fit the model."""


def error_list(heading: str, errors: list[str], limit: int = MAX_LISTED) -> str:
    """Join many errors into one message: a heading with their number, and a line for each of the
    first `limit`."""
    count = counted(len(errors), "error")
    return bullet_list(f"{heading}: {count}", errors, limit)


def counted(count: int, noun: str) -> str:
    """Return a number and a noun, in the plural unless the number is 1."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


def bullet_list(heading: str, lines: list[str], limit: int = MAX_LISTED) -> str:
    """Join a heading and indented lines; lines after the first `limit` are counted."""
    rows = [heading]
    rows += lines[:limit]
    num_hidden = len(lines) - limit
    if num_hidden > 0:
        hint = f"... and {num_hidden} more"
        rows.append(hint)
    return "\n  ".join(rows)
