"""What the libraries print while they load."""

from collections.abc import Iterator
from contextlib import contextmanager


def quieten() -> None:
    """No progress bars of the libraries' own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def unreported() -> Iterator[None]:
    """Inside, transformers does not list the tensors of a file that it has no use for, nor those
    that it lacks."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
