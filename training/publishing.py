"""Publishes the adapter of a run: on the Hugging Face Hub, and as artifacts of W&B."""

import re
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from common import hub
from common.announce import announced
from common.errors import ConfigError
from training.config import TrainConfig
from training.output_config import HubConfig
from training.report.hub_folder import (
    Publication,
    last_samples,
    main_adapters,
    write_hub_folder,
)
from training.report.run_files import RunFiles, read_run
from training.run_folder import HUB_FOLDER

MAX_ARTIFACT_NAME = 100
"""Characters of a run's name in the name of an artifact. W&B takes 128 with the rest."""


def publication_notes(config: HubConfig) -> list[str]:
    """Return what may keep the adapter from the Hub at the end. Raises ConfigError without a valid token.

    WHEN: before training."""
    if config.push is None:
        return []
    if hub.is_offline():
        return ["note: HF_HUB_OFFLINE is set: at the end the folder for the Hub is only written"]
    try:
        with announced("asking the Hub"):
            reason = hub.check_token()
    except hub.TokenError as error:
        raise ConfigError(f"--hub.push {config.push}: {error}") from error
    if reason is None:
        return []
    return [
        f"note: --hub.push {config.push}: the Hub does not answer, so the token was not checked: {reason}"
    ]


def publish(folder: Path, publication: Publication, wants_upload: bool = True) -> bool:
    """Write the folder `hub` of a run and upload it; print the result. Return whether all was done.

    `folder`: output_dir. Raises ConfigError before the end of a run."""
    run = read_run(folder)
    hub_folder = folder / HUB_FOLDER
    is_kept = write_hub_folder(run, hub_folder, publication)
    print(f"wrote {hub_folder}. Look at its README.md")
    if is_kept:
        print("note: the README.md of an earlier call is kept. Delete it to have it written again")
    if run.options["export"].get("metadata") == "full":
        print(
            "note: the metadata of the adapter hold paths of this computer (--export.metadata full)"
        )
    command = hub.upload_command(hub_folder, publication.repo, publication.is_public)
    if not wants_upload:
        print(f"To upload it: {command}")
        return True
    reason = hub.obstacle()
    if not reason:
        try:
            with announced("uploading to the Hub"):
                hub.upload(hub_folder, publication.repo, publication.is_public)
        except Exception as error:  # the network may raise anything
            reason = f"{type(error).__name__}: {error}"
    if reason:
        print(f"error: not uploaded: {reason}\nTo upload it later: {command}", file=sys.stderr)
        return False
    print(f"uploaded to https://huggingface.co/{publication.repo}")
    return True


def publish_run(config: TrainConfig, accelerator: Accelerator) -> None:
    """Publish the adapter of a finished run as the config asks for. An error ends nothing.

    WHERE: on the main process."""
    folder = Path(config.output_dir)
    if config.tracking.artifacts:
        try:
            with announced("storing artifacts"):
                log_artifacts(accelerator, read_run(folder))
        except Exception as error:  # the tracker may raise anything
            print(f"note: no artifacts were stored: {type(error).__name__}: {error}")
    repo = config.hub.push
    if repo is None:
        return
    publication = Publication(repo, config.hub.license, config.hub.public)
    try:
        publish(folder, publication, wants_upload=not hub.is_offline())
    except Exception as error:
        print(f"note: nothing was published: {type(error).__name__}: {error}")


def log_artifacts(accelerator: Accelerator, run: RunFiles) -> None:
    """Give the adapters and the last samples of a run to W&B."""
    import wandb

    tracked_run: Any = accelerator.get_tracker("wandb", unwrap=True)
    samples = last_samples(run)
    files = {
        "adapter": ("model", main_adapters(run)),
        "samples": ("samples", [*samples.values()]),
    }
    for name, (artifact_type, paths) in files.items():
        if not paths:
            continue
        run_name = re.sub(r"[^\w.-]", "-", run.name, flags=re.ASCII)[:MAX_ARTIFACT_NAME]
        artifact = wandb.Artifact(f"{run_name}-{name}", type=artifact_type)
        for path in paths:
            if path.is_dir():
                artifact.add_dir(str(path), name=path.name)
            else:
                artifact.add_file(str(path), name=path.name)
        tracked_run.log_artifact(artifact)
