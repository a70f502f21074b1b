"""Texts from outside, made fit to be shown."""


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
