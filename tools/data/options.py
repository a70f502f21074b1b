"""Options of the commands `data` and `export-dataset`: those of a run, and a few more. Imports no
torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tools.run_options import RunOptions
from training.config_errors import folder_errors


@dataclass(frozen=True, kw_only=True)
class DataCommandOptions(RunOptions):
    """Options of a command about training images."""

    def errors(self) -> list[str]:
        """Return the errors in the paths. No file is opened."""
        errors = super().errors()
        if self.config.objective.slider.needs_no_images:
            errors.append(
                "--objective.slider.start_from noise: a slider that is trained from noise has no "
                f"images, so `{self.command}` has nothing to read. Name the data of another run"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class ExportOptions(DataCommandOptions):
    """Write the encoded data of a run into a separate folder. Other machines, or ComfyUI, can train
    from it. Data that is not encoded yet is encoded first."""

    command: ClassVar[str] = "export-dataset"
    module: ClassVar[str] = "tools.data.export"

    out: str = ""
    """Folder to write. It must not exist."""
    form: Literal["encoded", "comfyui", "safetensors"] = "encoded"
    """encoded: for --data.path, with all captions, mirrored images and masks. comfyui: shards
    for ComfyUI's LoadTrainingDataset. safetensors: the same shards without pickle; ComfyUI does
    not read them."""

    def errors(self) -> list[str]:
        """Return the errors in the paths. No file is opened."""
        errors = super().errors()
        out = Path(self.out)
        if not self.out:
            errors.append("--out: no folder given. Name the folder to write")
        elif out.exists() or out.is_symlink():
            errors.append(f"--out {self.out}: already exists. Choose another path")
        return errors


@dataclass(frozen=True, kw_only=True)
class DataOptions(DataCommandOptions):
    """Print the data of a run with these options: sources, buckets, captions with their
    problems, and the amount of data that will be encoded. Nothing is trained or encoded."""

    command: ClassVar[str] = "data"
    module: ClassVar[str] = "tools.data.report"

    sheets: str | None = None
    """Folder for contact sheets: one PNG per bucket, with images and their captions."""
    decode: bool = False
    """Draw the stored latents, decoded by the VAE, instead of the images."""

    def errors(self) -> list[str]:
        """Return the errors in the paths. No file is opened."""
        errors = super().errors()
        if self.sheets is not None:
            errors += folder_errors("sheets", self.sheets)
            errors += self.source_folder_errors(self.sheets)
        elif self.decode:
            errors.append("--decode: has no effect without --sheets. Name a folder with --sheets")
        return errors

    def source_folder_errors(self, sheets: str) -> list[str]:
        """Return an error for each folder of images that contains the folder of the sheets."""
        sheets_folder = Path(sheets).resolve()
        outer_folders = (sheets_folder, *sheets_folder.parents)
        data = self.config.data
        paths = [source.path for source in data.all_sources()]
        if data.validation_path is not None:
            paths.append(data.validation_path)
        errors = []
        for path in paths:
            if Path(path).resolve() in outer_folders:
                errors.append(
                    f"--sheets {sheets}: is inside {path}, so the sheets would become training "
                    "images. Choose another folder"
                )
        return errors
