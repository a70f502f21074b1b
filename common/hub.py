"""The Hugging Face Hub: whether a folder can be uploaded, and the upload."""

import re
import shlex
from pathlib import Path

REPO_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
MAX_REPO_NAME = 96
"""Characters of user/name."""
REFUSED_PARTS = ("--", "..")
REFUSED_ENDINGS = ("-", ".", ".git")
"""Parts and endings that the Hub refuses."""
NO_TOKEN = "no token of the Hub. Use `hf auth login`, or set HF_TOKEN"
INVALID_TOKEN = "the Hub does not accept the token. Use `hf auth login` again"
UNAUTHORIZED = 401
"""HTTP status of a wrong token."""


class TokenError(Exception):
    """A token of the Hub that is missing or invalid."""


def repo_error(repo: str) -> str | None:
    """Return what is wrong with the name of a repository; None if it can be one."""
    if not REPO_NAME.fullmatch(repo):
        return "expected user/name with letters from a to z, digits, '-', '_' and '.'"
    if any(part in repo for part in REFUSED_PARTS) or repo.endswith(REFUSED_ENDINGS):
        return "the Hub refuses names with '--' or '..', and with '-', '.' or '.git' at the end"
    if len(repo) > MAX_REPO_NAME:
        return f"is too long; expected at most {MAX_REPO_NAME} characters"
    return None


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE


def check_token() -> str | None:
    """Raise TokenError without a valid token; return why the Hub gave no answer, if it did not."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise TokenError(NO_TOKEN)
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        response = error.response
        if response is not None and response.status_code == UNAUTHORIZED:
            raise TokenError(INVALID_TOKEN) from error
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # the network may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def obstacle() -> str:
    """Return why nothing can be uploaded, without asking the Hub; empty if it can."""
    from huggingface_hub import get_token

    if is_offline():
        return "HF_HUB_OFFLINE is set"
    if get_token() is None:
        return NO_TOKEN
    return ""


def upload_command(folder: Path, repo: str, is_public: bool) -> str:
    """Return the command that uploads a folder."""
    command = shlex.join(["hf", "upload", repo, str(folder)])
    return command if is_public else f"{command} --private"


def upload(folder: Path, repo: str, is_public: bool) -> None:
    """Create the repository if it does not exist, and upload the folder."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=not is_public, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message="Upload an adapter",
    )
