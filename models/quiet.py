"""The output of diffusers and transformers while they load."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def hide_progress_bars() -> None:
    """Turn the libraries' progress bars off."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def hide_guider_notes() -> None:
    """Hide the note of diffusers' guiders that they are experimental, which each of them writes."""
    logging.getLogger("diffusers.guiders.guider_utils").setLevel(logging.ERROR)


@contextmanager
def hide_load_report() -> Iterator[None]:
    """Hide transformers' lists of unused and of missing tensors of a file."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
