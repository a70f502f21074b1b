"""`push`: uploads the adapter of a finished run to the Hugging Face Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE

from tools.runs.options import PushOptions
from training.report.hub_folder import Publication, write_hub_folder
from training.report.run_files import read_run
from training.run import print_error


def run(options: PushOptions) -> int:
    """Write the folder and upload it; return the exit code: 1 if it was not uploaded."""
    folder = options.hub_folder
    files = read_run(Path(options.folder))
    publication = Publication(options.repo, options.license)
    is_kept = write_hub_folder(files, folder, publication)
    print(f"wrote {folder}. Look at its README.md")
    if is_kept:
        print("note: the README.md of an earlier call is kept. Delete it to have it written again")
    if files.options["export"].get("metadata") == "full":
        print(
            "note: the metadata of the adapter hold paths of this computer (--export.metadata full)"
        )
    command = shlex.join(["hf", "upload", options.repo, str(folder)])
    if not options.public:
        command += " --private"
    if not options.upload:
        print(f"To upload it: {command}")
        return 0
    reason = obstacle()
    if reason:
        print_error(f"not uploaded: {reason}. To upload it later: {command}")
        return 1
    try:
        upload(options, folder)
    except Exception as error:  # the network may raise anything
        reason = f"{type(error).__name__}: {error}"
        print_error(f"not uploaded: {reason}\nTo upload it later: {command}")
        return 1
    print(f"uploaded to https://huggingface.co/{options.repo}")
    return 0


def obstacle() -> str:
    """Return why nothing can be uploaded; empty if it can."""
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if get_token() is None:
        return "no token of the Hub. Use `hf auth login`, or set HF_TOKEN"
    return ""


def upload(options: PushOptions, folder: Path) -> None:
    """Create the repository if it does not exist, and upload the folder."""
    api = HfApi()
    api.create_repo(options.repo, private=not options.public, exist_ok=True)
    api.upload_folder(
        repo_id=options.repo,
        folder_path=folder,
        commit_message="Upload an adapter",
    )
