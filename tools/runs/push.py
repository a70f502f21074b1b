"""`push`: uploads the adapter of a finished run to the Hugging Face Hub."""

from pathlib import Path

from tools.runs.options import PushOptions
from training.publishing import publish
from training.report.hub_folder import Publication


def run(options: PushOptions) -> int:
    """Write the folder and upload it; return the exit code: 1 if it was not uploaded."""
    publication = Publication(
        options.repo,
        options.license,
        options.public,
    )
    folder = Path(options.folder)
    is_done = publish(folder, publication, options.upload)
    if not is_done:
        return 1
    return 0
