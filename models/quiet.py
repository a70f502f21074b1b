"""What the libraries print while they load."""


def quieten() -> None:
    """No progress bars of the libraries' own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
