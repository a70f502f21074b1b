"""The output of diffusers and transformers while they load."""

from collections.abc import Iterator
from contextlib import contextmanager


def hide_progress_bars() -> None:
    """Turn the libraries' progress bars off."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def hide_load_report() -> Iterator[None]:
    """Hide transformers' lists of unused and of missing tensors of a file."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
