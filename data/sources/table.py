"""A Hugging Face dataset: on disk (save_to_disk, parquet files, webdataset archives), from the Hub,
or streamed."""

import tarfile
import uuid
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.hashing import file_stamp, hash_of
from data.config import SourceConfig
from data.samples import ListedSample
from data.sources.base import SampleContent, Source
from data.sources.control_files import check_order, column_names
from data.sources.metadata import METADATA_NAMES, Description, describe, used_columns

LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
SAVED_NAMES = ("state.json", "dataset_dict.json")
"""Files that save_to_disk writes."""


def is_saved_dataset(folder: Path) -> bool:
    """Return whether save_to_disk wrote a folder."""
    return any((folder / name).is_file() for name in SAVED_NAMES)


def data_files(folder: Path) -> dict[str, list[str]]:
    """Return the data files directly in a folder, by the name of the loader that reads them."""
    files: dict[str, list[str]] = {}
    if not folder.is_dir():
        return files
    for path in sorted(folder.iterdir()):
        loader = LOADERS.get(path.suffix)
        if loader is not None and path.name not in METADATA_NAMES:
            files.setdefault(loader, []).append(str(path))
    return files


class TableSource(Source):
    """A Hugging Face dataset."""

    def __init__(self, config: SourceConfig, cache_dir: str, takes_controls: bool = False):
        """`takes_controls`: the model takes control images."""
        super().__init__(config)
        self.takes_controls = takes_controls
        self.library_cache = str(Path(cache_dir) / "datasets")
        """Folder for the files that `datasets` makes."""
        self.image_column = str(config.image_column)
        self.stream: Iterator[dict[str, Any]] | None = None
        self.stream_row = 0
        """Row that the stream yields next."""

    def samples(self) -> Iterator[ListedSample]:
        path = self.config.path
        try:
            dataset = self.dataset
        except DataError as error:
            self.errors.append(str(error))
            return
        stamp = " ".join([self._content_stamp(), self.image_column, *self.control_columns])
        num_rows = 0
        for row, description in enumerate(self._descriptions(dataset)):
            num_rows += 1
            if isinstance(description, DataError):
                self.errors.append(f"{path} row {row}: {description}")
                continue
            yield ListedSample(
                row=row,
                name=f"row {row}",
                captions=description.captions or [str(self.config.captions.text)],
                stamp=f"{stamp} {row}",
                repeats=self.config.repeats,
                weight=description.weight,
            )
        if not num_rows:
            self.errors.append(f"{path}: the dataset is empty")

    def contents(self, samples: Iterable[ListedSample]) -> Iterator[SampleContent]:
        for sample in samples:
            try:
                cells = self._read_row(sample.row)
                cell = cells[self.image_column]
                content = image_content(cell)
                controls = self._control_contents(cells)
            except (OSError, tarfile.TarError) as error:
                yield SampleContent(sample, DataError(f"cannot be read: {error}"))
                continue
            except DataError as error:
                yield SampleContent(sample, error)
                continue
            yield SampleContent(sample, content, controls)

    def _control_contents(self, cells: dict[str, Any]) -> tuple[bytes, ...]:
        """Return the contents of the control images in a row. Cells hold an image, several, or none."""
        control_cells = {column: cells[column] for column in self.control_columns}
        check_order(control_cells)
        contents: list[bytes] = []
        for cell in control_cells.values():
            images = cell if isinstance(cell, list) else [cell]
            contents += [image_content(image) for image in images if image is not None]
        return tuple(contents)

    @cached_property
    def control_columns(self) -> list[str]:
        """The columns with control images, if the model takes them."""
        if not self.takes_controls or self.config.control_paths == ():
            return []
        return column_names(self.config.control_columns, self._loaded.column_names)

    @cached_property
    def dataset(self) -> Any:
        """Load the dataset. Raises DataError if it cannot be loaded or lacks a column."""
        import datasets

        dataset = self._loaded
        self._check_columns(dataset)
        undecoded = datasets.Image(decode=False)
        dataset = dataset.cast_column(self.image_column, undecoded)
        for column in self.control_columns:
            is_list = isinstance(dataset.features[column], datasets.List)
            feature = datasets.List(undecoded) if is_list else undecoded
            dataset = dataset.cast_column(column, feature)
        return dataset

    @cached_property
    def _loaded(self) -> Any:
        """Load the dataset, whose columns are not checked yet."""
        dataset = self._select_split(self._load())
        if dataset.column_names is None:
            dataset = dataset._resolve_features()
        return dataset

    def _load(self) -> Any:
        """Load the dataset, or all of its splits."""
        import datasets  # a slow import

        path = self.config.path
        load_errors = (
            OSError,
            ValueError,
            RuntimeError,
            tarfile.TarError,
            datasets.exceptions.DatasetsError,
        )
        try:
            if is_saved_dataset(Path(path)):
                return datasets.load_from_disk(path)
            loader, files = self._loader()
            return datasets.load_dataset(
                loader,
                data_files=files,
                streaming=self.config.streaming,
                cache_dir=self.library_cache,
            )
        except load_errors as error:
            raise DataError(f"{path}: could not be loaded as a dataset: {error}") from error

    def _loader(self) -> tuple[str, dict[str, list[str]] | None]:
        """Return the name of the loader and its files; for other folders and the Hub, the path."""
        path = self.config.path
        files = data_files(Path(path))
        if not files:
            return path, None
        if len(files) > 1:
            formats = " and ".join(files)
            raise DataError(f"it has {formats} files. Keep the files of one format")
        ((loader, names),) = files.items()
        return loader, {"train": names}

    def _select_split(self, loaded: Any) -> Any:
        """Return the configured split, `train`, or the only split."""
        path, split = self.config.path, self.config.split
        if not isinstance(loaded, dict):  # DatasetDict and IterableDatasetDict are dicts
            return loaded
        names = ", ".join(loaded)
        if split is None and len(loaded) == 1:
            (split,) = loaded
        if split is None and "train" not in loaded:
            raise DataError(f"{path}: has the splits {names}. Choose one with the option split")
        split = split or "train"
        if split not in loaded:
            raise DataError(f"{path}: has no split {split}. Its splits: {names}")
        return loaded[split]

    def _check_columns(self, dataset: Any) -> None:
        """Raise DataError if a column is missing, or the image column holds something else."""
        import datasets

        path, column_names = self.config.path, dataset.column_names
        columns = {"image_column": self.image_column, **used_columns(self.config)}
        for column in self.control_columns:
            columns[f"control_columns {column}"] = column
        errors = []
        for flag, column in columns.items():
            if column not in column_names:
                errors.append(f"no column {column} (--data.{flag})")
        if errors:
            message = f"{path}: {', '.join(errors)}. Its columns: {', '.join(column_names)}"
            raise DataError(message)
        for column in (self.image_column, *self.control_columns):
            feature = (dataset.features or {}).get(column)
            if column != self.image_column and isinstance(feature, datasets.List):
                feature = feature.feature
            if feature is not None and not isinstance(feature, datasets.Image):
                raise DataError(f"{path}: column {column} holds {feature}, not images")

    def _descriptions(self, dataset: Any) -> Iterator[Description | DataError]:
        """Yield the description of each row, or its error."""
        columns = list(used_columns(self.config).values())
        if not columns:
            rows = range(len(dataset)) if hasattr(dataset, "__len__") else dataset
            for _ in rows:
                yield Description(None, 1.0)
            return
        for cells in dataset.select_columns(columns):
            try:
                yield describe(cells, self.config)
            except DataError as error:
                yield error

    def _content_stamp(self) -> str:
        """Return a text that changes with the content.

        If there is no way to know, it differs in every run."""
        files = data_files(Path(self.config.path))
        paths = [Path(name) for names in files.values() for name in names]
        if paths:
            stamps = [file_stamp(path) for path in paths]
            return hash_of(*stamps)  # short, because every row's stamp contains it
        return getattr(self.dataset, "_fingerprint", "") or uuid.uuid4().hex

    def _read_row(self, row: int) -> dict[str, Any]:
        """Return a row.

        A stream is read in the order of its rows, and starts again for an earlier row."""
        if hasattr(self.dataset, "__len__"):
            return self.dataset[row]
        if self.stream is None or row < self.stream_row:
            self.stream = iter(self.dataset)
            self.stream_row = 0
        while self.stream_row < row:
            next(self.stream)
            self.stream_row += 1
        self.stream_row += 1
        return next(self.stream)


def image_content(cell: Any) -> bytes:
    """Return the content of an image file, which is in a cell or at the path in it."""
    if cell is None:
        return b""
    if cell["bytes"] is not None:
        return cell["bytes"]
    return Path(cell["path"]).read_bytes()
