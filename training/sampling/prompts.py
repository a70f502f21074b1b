"""The prompts of sample images. This module imports no torch, because config errors must be fast.

A prompt may end with options, as in kohya's trainers:

  a red fox in the snow --n blurry --w 768 --h 512 --d 42 --l 4.5 --s 20
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from training.output_config import SampleConfig

NUM_DEFAULT_PROMPTS = 4
"""Captions that are the prompts, if none are set."""
OPTION_PATTERN = re.compile(r"\s--(\w+)(?=\s|$)")
EQUALS_PATTERN = re.compile(r"\s--(\w+)=")


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt and the options of its image. None: the run's option."""

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    strength: float | None = None
    """Factor on the update of the adapter."""
    controls: tuple[str, ...] = ()
    """Paths of the control images, for models that edit."""

    def completed(self, number: int, side: int, config: SampleConfig) -> "SamplePrompt":
        """Return the prompt with all options but the negative prompt.

        Each prompt number has its own noise. `side`: default width and height."""
        defaults = {
            "width": side,
            "height": side,
            "seed": (config.seed + number) % 2**64,
            "guidance_scale": config.guidance_scale,
            "num_inference_steps": config.num_inference_steps,
            "strength": 1.0,
        }
        missing: dict[str, Any] = {}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                missing[name] = value
        return replace(self, **missing)


class PromptOption(NamedTuple):
    """An option after a prompt: the field that it sets, its type and its smallest and largest
    value."""

    field: str
    type: type
    smallest: float = 0
    largest: float = 0
    is_repeatable: bool = False
    """True if the field holds all values of the option."""


OPTIONS = {
    "n": PromptOption("negative", str),
    "w": PromptOption("width", int, 8, 16384),
    "h": PromptOption("height", int, 8, 16384),
    "d": PromptOption("seed", int, 0, 2**64 - 1),
    "l": PromptOption("guidance_scale", float, 0, 1000),
    "g": PromptOption("guidance_scale", float, 0, 1000),
    "s": PromptOption("num_inference_steps", int, 1, 1000),
    "am": PromptOption("strength", float, -10, 10),
    "ci": PromptOption("controls", str, is_repeatable=True),
}
"""Letters after the prompt, as kohya's trainers have them."""


def parse_prompt(line: str) -> SamplePrompt:
    """Read a prompt with its options. Raises ValueError naming all errors."""
    text, *letters_and_values = OPTION_PATTERN.split(f" {line}")
    values: dict[str, Any] = {}
    errors = []
    for letter in EQUALS_PATTERN.findall(f" {line}"):
        errors.append(f"--{letter}=: write a space instead of =")
    letters, texts = letters_and_values[::2], letters_and_values[1::2]
    for letter, value in zip(letters, texts, strict=True):
        option = OPTIONS.get(letter)
        if option is None:
            known_options = ", ".join(f"--{known_letter}" for known_letter in OPTIONS)
            errors.append(f"--{letter} is not an option of a prompt; expected {known_options}")
            continue
        if option.field in values and not option.is_repeatable:
            errors.append(f"--{letter} is repeated")
        try:
            converted = option_value(option, value.strip())
        except ValueError as error:
            option_text = f"--{letter} {value.strip()}".rstrip()
            errors.append(f"{option_text}: {error}")
            continue
        if option.is_repeatable:
            values[option.field] = (*values.get(option.field, ()), converted)
        else:
            values[option.field] = converted
    if not text.strip():
        errors.append("has no text before its options")
    if errors:
        raise ValueError("; ".join(errors))
    return SamplePrompt(text.strip(), **values)


def option_value(option: PromptOption, text: str) -> str | float:
    """Convert the text of an option. Raises ValueError."""
    if not text:
        raise ValueError("has no value")
    if option.type is str:
        return text
    kind = "whole number" if option.type is int else "number"
    expected = f"expected a {kind} from {option.smallest} to {option.largest}"
    try:
        number = option.type(text)
    except ValueError as error:
        raise ValueError(expected) from error
    if not option.smallest <= number <= option.largest:
        raise ValueError(expected)
    return number


class LocatedPrompt(NamedTuple):
    """A prompt and where it is, for messages: an option, or a line of a file."""

    place: str
    prompt: SamplePrompt


def configured_prompts(config: SampleConfig) -> list[SamplePrompt]:
    """Return the prompts of the options, and then those of the prompt file. Raises ValueError."""
    return [prompt for _, prompt in located_prompts(config)]


def located_prompts(config: SampleConfig) -> list[LocatedPrompt]:
    """Return `configured_prompts` and their places. Raises ValueError, whose arguments are all errors."""
    prompts = []
    errors = []
    for place, line in prompt_lines(config):
        try:
            prompts.append(LocatedPrompt(place, parse_prompt(line)))
        except ValueError as error:
            errors.append(f"{place}: {error}")
    if errors:
        raise ValueError(*errors)
    return prompts


def prompt_lines(config: SampleConfig) -> list[tuple[str, str]]:
    """Return each prompt, after the option or the line of a file that it comes from.

    Empty lines of a file and those that begin with # are left out. Raises ValueError."""
    lines = []
    for prompt in config.prompts:
        lines.append((f"--sample.prompts {prompt!r}", prompt))
    if config.prompt_file is None:
        return lines
    flag = f"--sample.prompt_file {config.prompt_file}"
    try:
        content = Path(config.prompt_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: is not a UTF-8 text file. Save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{flag}: could not be read: {error.strerror}") from error
    for number, line in enumerate(content.split("\n"), 1):
        text = line.strip()
        is_prompt = text and not text.startswith("#")
        if is_prompt:
            lines.append((f"{flag}, line {number}", text))
    if not lines:
        raise ValueError(f"{flag}: has no prompts. Write one per line")
    return lines


def prompt_errors(config: SampleConfig) -> list[str]:
    """Return the errors in the prompts of the options."""
    errors = []
    if config.at_start and not config.every:
        errors.append("--sample.at_start: draws nothing without --sample.every. Also set it")
    try:
        located_prompts(config)
    except ValueError as error:
        errors += error.args
    return errors


def size_errors(config: SampleConfig, step: int) -> list[str]:
    """Return the sizes that are no multiples of `step`, each with the nearest sizes."""
    errors = []
    for place, prompt in located_prompts(config):
        for letter, size in (("w", prompt.width), ("h", prompt.height)):
            if size is not None and size % step:
                smaller = max(step, size // step * step)
                errors.append(
                    f"{place}: --{letter} {size} is not a multiple of {step}. Use {smaller} or "
                    f"{size // step * step + step}"
                )
    return errors
