"""Options of the commands that read the folders of runs. Imports no torch, so that they answer at
once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from tyro.conf import Positional, arg

from common.hub import repo_error
from training.run_folder import (
    CONFIG_FILE,
    REPORT,
    STATUS_FILE,
    is_run_folder,
)

COMPARISON = "comparison.html"
MARKER = b'<meta name="generator" content="train_lora.py report">'
MARKER_WITHIN = 1000
"""Bytes at the start of a page in which it names its generator."""


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Options of a command that reads the folders of runs."""

    command: ClassVar[str]

    def errors(self) -> list[str]:
        """Return the errors in the values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ReportOptions(FolderOptions):
    """Write the report of a run again, or a page that compares several runs."""

    command: ClassVar[str] = "report"

    folders: Annotated[Positional[tuple[str, ...]], arg(metavar="OUTPUT_DIR ...")]
    """The output_dir of a run, or of several runs."""
    out: str | None = None
    """Path of the page. None: report.html in the folder of the run; for several runs, comparison.html in
    the current folder."""
    overwrite: bool = False
    """Replace the page if it exists and is not one of this command."""

    @property
    def path(self) -> Path:
        """Return the path of the page."""
        if self.out is not None:
            return Path(self.out)
        if len(self.folders) == 1:
            return Path(self.folders[0]) / REPORT
        return Path(COMPARISON)

    def errors(self) -> list[str]:
        errors = missing_folder_errors(self.folders)
        for name in self.folders:
            folder = Path(name)
            if folder.is_dir() and not is_run_folder(folder):
                inner = [run.name for run in run_folders(folder)]
                advice = "Name the --output_dir of a run that has begun to train"
                if inner:
                    advice = f"Runs in it: {', '.join(inner)}. Name these folders"
                errors.append(
                    f"OUTPUT_DIR {name}: holds no run; expected a folder with {CONFIG_FILE}. {advice}"
                )
        is_own_report = self.out is None and len(self.folders) == 1
        if not errors and not is_own_report:
            errors += self.out_errors(self.path)
        return errors

    def out_errors(self, path: Path) -> list[str]:
        """Return why the page cannot be written."""
        if path.suffix != ".html":
            return [f"--out {path}: must end in .html"]
        if not path.parent.is_dir():
            return [f"--out {path}: the folder {path.parent} does not exist"]
        if path.exists() and not is_report(path) and not self.overwrite:
            return [
                f"--out {path}: exists and is not a report. Choose another path, or add --overwrite"
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class StatusOptions(FolderOptions):
    """Print what runs are doing, and which of them are dead. The exit code is 1 if a run has failed, is
    dead or trains no steps."""

    command: ClassVar[str] = "status"

    folders: Annotated[Positional[tuple[str, ...]], arg(metavar="OUTPUT_DIR ...")]
    """Folders of runs, or folders that hold folders of runs."""
    json: bool = False
    """Print JSON instead of a table."""

    def errors(self) -> list[str]:
        errors = missing_folder_errors(self.folders)
        for name in self.folders:
            folder = Path(name)
            if folder.is_dir() and not run_folders(folder):
                errors.append(
                    f"OUTPUT_DIR {name}: holds no {STATUS_FILE}, and neither do the folders in it. Name "
                    "the --output_dir of a run"
                )
        return errors


@dataclass(frozen=True, kw_only=True)
class PushOptions(FolderOptions):
    """Upload the adapter of a finished run to the Hugging Face Hub, with samples and a model card."""

    command: ClassVar[str] = "push"

    folder: Annotated[Positional[str], arg(metavar="OUTPUT_DIR")]
    """The output_dir of the run."""
    repo: str
    """Repository, as user/name. It is created if it does not exist."""
    public: bool = False
    """Create a public repository. Existing ones stay as they are."""
    license: str | None = None
    """License in the model card, as the Hub names it, such as apache-2.0."""
    upload: bool = True
    """Upload the folder. Otherwise it is only written."""

    def errors(self) -> list[str]:
        errors = missing_folder_errors((self.folder,))
        folder = Path(self.folder)
        if folder.is_dir() and not is_run_folder(folder):
            errors.append(
                f"OUTPUT_DIR {self.folder}: holds no run; expected a folder with {CONFIG_FILE}"
            )
        error = repo_error(self.repo)
        if error:
            errors.append(f"--repo {self.repo}: {error}")
        return errors


FOLDER_OPTIONS: dict[str, type[FolderOptions]] = {
    options.command: options for options in (ReportOptions, StatusOptions, PushOptions)
}


def missing_folder_errors(names: tuple[str, ...]) -> list[str]:
    """Return an error for each name that is not a folder, and one if there are no names."""
    if not names:
        return ["OUTPUT_DIR: no folder given. Name the --output_dir of a run"]
    return [
        f"OUTPUT_DIR {name}: is not a folder. Check the path"
        for name in names
        if not Path(name).is_dir()
    ]


def is_report(path: Path) -> bool:
    """Return whether a file is a page of this program."""
    try:
        with path.open("rb") as file:
            return MARKER in file.read(MARKER_WITHIN)
    except OSError:
        return False


def run_folders(folder: Path) -> list[Path]:
    """Return the folder if it has a status, or else those of the folders in it that have one."""
    if (folder / STATUS_FILE).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{STATUS_FILE}"))


def parse_folder_options(argv: list[str]) -> FolderOptions:
    """Return the options in `argv`, which begins with the command.

    tyro ends the program with exit code 2 for wrong names and types."""
    command, *arguments = argv
    return tyro.cli(
        FOLDER_OPTIONS[command],
        args=arguments,
        use_underscores=True,
        prog=f"train_lora.py {command}",
    )
