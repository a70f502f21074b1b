"""A folder of images or videos, with captions in files, in a metadata file, or one for all."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import DataError, counted
from common.hashing import file_stamp, hash_of
from data.config import DataConfig, SourceConfig
from data.media.images import EXTENSIONS as IMAGE_EXTENSIONS
from data.media.video import EXTENSIONS as VIDEO_EXTENSIONS
from data.samples import ListedSample
from data.sources.base import SampleContent, Source
from data.sources.control_files import CONTROL_NAME, ControlFolders, normalized
from data.sources.directories import MASK_SUFFIX, Directory, FileKinds, walk_directories
from data.sources.metadata import METADATA_NAMES, Description, named_controls, read_metadata

REPEATS_FOLDER = re.compile(r"(\d{1,4})_.*")
"""Name of a folder whose images are repeated, in kohya's convention: <repeats>_<name>."""


@dataclass
class Survey:
    """Counts of the files in a folder and its sub-folders."""

    num_images: int = 0
    num_captions: int = 0
    num_metadata: int = 0
    num_controls: int = 0
    other_kinds: Counter[str] = field(default_factory=Counter)
    unused_captions: list[Path] = field(default_factory=list)

    def add(self, directory: Directory) -> None:
        """Count the files of a directory."""
        self.num_images += len(directory.images)
        self.num_captions += len(directory.caption_files())
        self.num_metadata += directory.metadata is not None
        self.num_controls += len(directory.controls)
        self.other_kinds += directory.other_kinds
        self.unused_captions += directory.unused_captions()

    def shared_caption(self) -> Path | None:
        """Return the caption file for all images: the only one, which belongs to no image.

        A text file next to a metadata file is not a caption."""
        is_only_one = self.num_captions == len(self.unused_captions) == 1
        if is_only_one and self.num_images and not self.num_metadata:
            return self.unused_captions[0]
        return None


class FolderSource(Source):
    """A folder of images or videos, with its sub-folders.

    The folder is walked twice: counts come first, because they decide where captions come from, and
    the names of all files need not be in memory."""

    def __init__(
        self,
        config: SourceConfig,
        data: DataConfig,
        has_videos: bool = False,
        takes_controls: bool = False,
    ):
        """`has_videos`: video files are used too. `takes_controls`: the model takes control images."""
        super().__init__(config)
        self.takes_controls = takes_controls
        for path in config.control_paths or ():
            if Path(path).resolve() == Path(config.path).resolve():
                raise DataError(
                    f"--data.control_paths {path}: is the folder of the images, so each image would be "
                    "its own control image. Name another folder"
                )
        self.folder = Path(config.path)
        self.captions = config.captions
        self.uses_masks = data.masks == "files"
        extensions = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS if has_videos else IMAGE_EXTENSIONS
        self.kinds = FileKinds(
            media=frozenset(extensions),
            captions=tuple(extension.lower() for extension in self.captions.extensions or ()),
            uses_masks=self.uses_masks,
            other_folders=frozenset(Path(path).resolve() for path in config.control_paths or ()),
        )
        self.shared_caption: Path | None = None
        self.control_folders = ControlFolders(self.folder, config.control_paths or ())
        self.described: set[Path] = set()
        """Images that metadata files describe."""
        self.named_controls: set[Path] = set()
        """Control images that metadata files name, which may be among the images."""

    def samples(self) -> Iterator[ListedSample]:
        survey = self._survey()
        if not self._is_usable(survey):
            return
        row = 0
        descriptions: dict[Path, Description] = {}
        for directory in walk_directories(self.folder, self.kinds):
            if directory.metadata is not None:
                # it may describe images in sub-folders, which are walked later
                metadata = read_metadata(directory.metadata, self.config, self.takes_controls)
                descriptions |= metadata.descriptions
                self.described |= metadata.descriptions.keys()
                self.errors += metadata.errors
            for image in self._images(directory, descriptions):
                description = descriptions.pop(image, None)
                try:
                    sample = self._sample(row, image, directory, description)
                except DataError as error:
                    self.errors.append(str(error))
                    continue
                row += 1
                yield sample
        self.control_folders.forget()

    def _images(
        self, directory: Directory, descriptions: Mapping[Path, Description]
    ) -> Iterator[Path]:
        """Yield the images of a directory. A file that looks like a control image is one of them if a
        metadata file describes it."""
        for image in directory.images:
            if normalized(image) not in self.named_controls:
                yield image
        for files in directory.controls.values():
            for file in files:
                if file in descriptions:
                    yield file

    def contents(self, samples: Iterable[ListedSample]) -> Iterator[SampleContent]:
        for sample in samples:
            try:
                content = (self.folder / sample.name).read_bytes()
                controls = read_controls(sample.control_paths)
            except OSError as error:
                yield SampleContent(sample, DataError(f"cannot be read: {error.strerror}"))
            except DataError as error:
                yield SampleContent(sample, error)
            else:
                yield SampleContent(sample, content, controls)

    def _survey(self) -> Survey:
        """Count all files, and add the errors in their names."""
        survey = Survey()
        for directory in walk_directories(self.folder, self.kinds):
            survey.add(directory)
            self.errors += directory.errors
            if directory.metadata is not None:
                self.named_controls |= named_controls(directory.metadata, self.config)
            if self.captions.text is not None:
                for path in directory.caption_files():
                    self.errors.append(
                        f"{path}: a caption file, but --data.captions.text is set. Use one of them"
                    )
        return survey

    def _print_unused(self, survey: Survey) -> None:
        """Print a note about control images that the model does not take, and one about files that are
        neither images nor captions."""
        if survey.num_controls and not self.takes_controls:
            images = counted(survey.num_controls, "image")
            verb = "has" if survey.num_controls == 1 else "have"
            print(
                f"note: {self.folder}: {images} {verb} control images, which this model does not take"
            )
        if not survey.other_kinds:
            return
        counts = [f"{kind} {count}" for kind, count in sorted(survey.other_kinds.items())]
        files = counted(survey.other_kinds.total(), "file")
        print(f"note: {self.folder}: {files} not used: {', '.join(counts)}")

    def _is_usable(self, survey: Survey) -> bool:
        """Choose where captions come from. Add an error if there are no images or no captions."""
        if not survey.num_images:
            media_kinds = ", ".join(sorted(self.kinds.media))
            other_kinds = ", ".join(sorted(survey.other_kinds)) or "nothing"
            self.errors.append(f"{self.folder}: no images ({media_kinds}). It holds {other_kinds}")
            return False
        self._print_unused(survey)
        if self.config.control_columns and not survey.num_metadata:
            columns = " ".join(self.config.control_columns)
            self.errors.append(
                f"{self.folder}: no metadata file ({', '.join(METADATA_NAMES)}), which "
                f"--data.control_columns {columns} needs"
            )
        if self.captions.text is not None:
            return True
        self.shared_caption = survey.shared_caption()
        if self.shared_caption is not None:
            print(f"note: {self.shared_caption} is the caption of all images")
        if self.shared_caption is None and not survey.num_metadata:
            for path in survey.unused_captions:
                kinds = ", ".join(sorted(self.kinds.media))
                self.errors.append(f"{path}: a caption without an image ({kinds})")
        if not survey.num_captions and not survey.num_metadata:
            extensions = " or ".join(self.kinds.captions)
            images = counted(survey.num_images, "image")
            verb = "has" if survey.num_images == 1 else "have"
            self.errors.append(
                f"{self.folder}: {images} {verb} no {extensions} files. Write "
                "caption files, or set one caption for all images with --data.captions.text"
            )
            return False
        return True

    def _sample(
        self, row: int, image: Path, directory: Directory, description: Description | None
    ) -> ListedSample:
        """Return the sample of an image. Raises DataError if it cannot be used."""
        self._check_name(image, directory)
        captions = self._captions(image, directory, description)
        mask_path = ""
        if self.uses_masks:
            mask_path = str(find_mask(image, directory))
        try:
            stamp = file_stamp(image)
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror}") from error
        controls = self._controls(image, directory, description)
        if controls:
            stamp = hash_of(stamp, *map(control_stamp, controls))
        return ListedSample(
            row=row,
            name=image.relative_to(self.folder).as_posix(),
            captions=captions,
            stamp=stamp,
            repeats=self.config.repeats * folder_repeats(image, self.folder),
            weight=1.0 if description is None else description.weight,
            mask_path=mask_path,
            control_paths=[str(path) for path in controls],
        )

    def _check_name(self, image: Path, directory: Directory) -> None:
        """Raise DataError if a file is a control image by its name, and its image is missing."""
        match = CONTROL_NAME.fullmatch(image.stem)
        has_caption = image.stem in directory.captions
        if match is None or not self.takes_controls or has_caption:
            return
        if image not in self.described:
            raise DataError(
                f"{image}: a control image by its name, but no image {match[1]} is next to it"
            )

    def _controls(
        self, image: Path, directory: Directory, description: Description | None
    ) -> Sequence[Path]:
        """Return the control images of an image: of its row in a metadata file, of the folders of the
        options, or those next to it."""
        if not self.takes_controls or self.config.control_paths == ():
            return ()
        if description is not None and description.controls:
            return description.controls
        if self.config.control_paths:
            image_names = {file.stem for file in directory.images}
            return self.control_folders.files(image, image_names)
        return directory.controls.get(image.stem, ())

    def _captions(
        self, image: Path, directory: Directory, description: Description | None
    ) -> list[str]:
        """Return the captions of an image."""
        if self.captions.text is not None:
            return [self.captions.text]
        files = directory.captions.get(image.stem, [])
        if self.shared_caption is not None:
            files = [self.shared_caption]
        if description is not None and description.captions is not None:
            if not files:
                return description.captions
            self.errors.append(
                f"{image}: captions in {files[0].name} and in a metadata file. Keep one of them"
            )
        if not files:
            extension = (self.kinds.captions or (".txt",))[0]
            raise DataError(f"{image}: no caption file {image.stem}{extension} next to it")
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            self.errors.append(f"{image}: several caption files, {names}. Keep one of them")
        return read_captions(files[0], bool(self.captions.one_per_line))


def control_stamp(path: Path) -> str:
    """Return the stamp of a control image. Raises DataError."""
    try:
        return file_stamp(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_controls(paths: Iterable[str]) -> tuple[bytes, ...]:
    """Return the contents of control images. Raises DataError."""
    contents = []
    for path in paths:
        try:
            contents.append(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"control image {path} cannot be read: {error.strerror}") from error
    return tuple(contents)


def read_captions(file: Path, one_per_line: bool) -> list[str]:
    """Return the caption in a file, or all of them. Raises DataError if it cannot be read."""
    try:
        text = file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        message = f"{file}: not UTF-8 (byte {error.start}: {error.reason})"
        raise DataError(message) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if one_per_line and lines else [text]


def find_mask(image: Path, directory: Directory) -> Path:
    """Return the mask file of an image."""
    name = image.stem + MASK_SUFFIX
    if name not in directory.masks:
        raise DataError(f"{image}: no mask {name}.<extension> next to it (--data.masks files)")
    return directory.masks[name]


def folder_repeats(image: Path, folder: Path) -> int:
    """Return the repeats of an image by the name of its folder, in kohya's convention."""
    for parent in image.parents:
        match = REPEATS_FOLDER.fullmatch(parent.name)
        if match:
            return max(1, int(match[1]))
        if parent == folder:
            break
    return 1
