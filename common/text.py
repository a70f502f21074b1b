"""Texts from outside, made fit to be shown."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDERS = re.compile(
    r"(?:\w+:///?(?<!https://)(?<!http://)|(?<![\w./~-]))(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",:;]+[/\\])+"
)
"""Folders of an absolute path in a text."""
QUOTED_PATH = re.compile(r"""(['"`])(?:~|[A-Za-z]:)?[/\\][^'"`\n]*[/\\]([^'"`/\\\n]+)\1""")
"""An absolute path in quotes, which may contain spaces."""
HIDDEN = ".../"


def one_line(text: str, max_length: int) -> str:
    """Return the start of a text in one line, without control characters, for a terminal."""
    words = text[: 4 * max_length].split()
    line = " ".join(words)
    if not line.isprintable():
        for character in set(line):
            if not character.isprintable():
                line = line.replace(character, " ")
    if len(line) <= max_length:
        return line
    return line[: max_length - 3] + "..."


def public_text(text: str, paths: Iterable[str] = ()) -> str:
    """Return a text in which absolute paths are only the names of their files.

    A report is sent to others, whom user names and folders do not concern. `paths`: those that the text
    may contain; other paths are shortened up to their first space."""
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, public_value(path))
    for folder in (os.getcwd(), os.path.expanduser("~")):
        if " " in folder:
            text = text.replace(folder + os.sep, HIDDEN)
    text = QUOTED_PATH.sub(rf"\1{HIDDEN}\2\1", text)
    text = FOLDERS.sub(HIDDEN, text)
    return text.replace(HIDDEN + HIDDEN, HIDDEN)


def public_value(text: str) -> str:
    """Return an option without the folders of its path, which may contain spaces."""
    if is_private_path(text):
        return HIDDEN + Path(text).name
    return public_text(text)


def is_private_path(text: str) -> bool:
    """Return whether a text is a path that tells where the files of a user are: one that begins at the
    root or at a home, or leaves the working folder."""
    path = Path(text)
    return path.is_absolute() or text.startswith("~") or ".." in path.parts


def public_values(values: Any) -> Any:
    """Return options with public texts only."""
    if isinstance(values, dict):
        return {name: public_values(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [public_values(value) for value in values]
    if isinstance(values, str):
        return public_value(values)
    return values
