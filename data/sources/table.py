"""A Hugging Face dataset: on disk (save_to_disk, parquet files, webdataset archives) or on the hub,
or streamed."""

import tarfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.config import SourceConfig
from data.sources.base import Entry, Source
from data.sources.metadata import METADATA, Described, columns, described
from data.store.hashing import digest, stamp_of

LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


def files_of(folder: Path) -> dict[str, list[str]]:
    """The data files directly in a folder, by the name of the loader that reads them."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in LOADERS and file.name not in METADATA:
            found.setdefault(LOADERS[file.suffix], []).append(str(file))
    return found


class TableSource(Source):
    """A Hugging Face dataset."""

    def __init__(self, config: SourceConfig, cache_dir: str):
        super().__init__(config)
        self.cache_dir = str(
            Path(cache_dir) / "datasets"
        )  # where the library puts what it makes of files
        self._loaded: Any = None
        self._stream: Iterator[dict[str, Any]] | None = None
        self._position = 0

    def _load(self) -> Any:
        """The dataset; DataError if it cannot be had or lacks a column."""
        import datasets  # slow import

        config, folder = self.config, Path(self.config.path)
        files = files_of(folder)
        cached = {"cache_dir": self.cache_dir}
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded: Any = datasets.load_from_disk(config.path)
            elif files:
                (loader, names), *others = files.items()
                if others:
                    raise DataError(
                        f"{folder}: {' and '.join(files)} files; keep those of one kind"
                    )
                options = {"data_files": {"train": names}, "streaming": config.streaming, **cached}
                loaded = datasets.load_dataset(loader, **options)
            else:
                loaded = datasets.load_dataset(config.path, streaming=config.streaming, **cached)
        except (
            OSError,
            ValueError,
            RuntimeError,
            tarfile.TarError,
            datasets.exceptions.DatasetsError,
        ) as error:
            raise DataError(f"{config.path}: could not be loaded as a dataset: {error}") from error
        return self._checked(self._split(loaded))

    def _split(self, loaded: Any) -> Any:
        config = self.config
        if not isinstance(loaded, dict):  # DatasetDict and IterableDatasetDict are
            return loaded
        if config.split is not None and config.split not in loaded:
            raise DataError(f"{config.path}: no split {config.split}; it has {', '.join(loaded)}")
        if config.split is None and "train" not in loaded and len(loaded) > 1:
            raise DataError(f"{config.path}: splits {', '.join(loaded)}; choose one with split")
        return loaded[config.split or ("train" if "train" in loaded else next(iter(loaded)))]

    def _checked(self, loaded: Any) -> Any:
        import datasets

        config = self.config
        if loaded.column_names is None:
            loaded = loaded._resolve_features()
        wanted = [("image_column", config.image_column), *columns(config).items()]
        faults = [
            f"{config.path}: no column {column}; it has {', '.join(loaded.column_names)} (--data.{flag})"
            for flag, column in wanted
            if column not in loaded.column_names
        ]
        if faults:
            raise DataError("\n  ".join(faults))
        feature = (loaded.features or {}).get(config.image_column)
        if feature is not None and not isinstance(feature, datasets.Image):
            raise DataError(
                f"{config.path}: column {config.image_column} holds {feature}, not images"
            )
        return loaded.cast_column(config.image_column, datasets.Image(decode=False))

    def _identity(self) -> str:
        """What changes with the content: without a way to know, nothing is the same as in another
        run."""
        files = [name for found in files_of(Path(self.config.path)).values() for name in found]
        if files:
            return digest(
                *(stamp_of(Path(name)) for name in files)
            )  # of many files, and it is in every row's stamp
        return getattr(self.loaded, "_fingerprint", "") or uuid.uuid4().hex

    @property
    def loaded(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def entries(self, faults: list[str]) -> Iterator[Entry]:
        try:
            loaded = self.loaded
        except DataError as error:
            faults.append(str(error))
            return
        config, row = self.config, -1
        identity = f"{self._identity()} {config.image_column}"
        read = list(columns(config).values())
        for row, cells in enumerate(loaded.select_columns(read) if read else range_of(loaded)):
            try:
                found = described(cells, config) if read else Described(None, 1.0)
            except DataError as error:
                faults.append(f"{config.path} row {row}: {error}")
                continue
            texts = found.captions or [str(config.captions.text)]
            yield Entry(row, f"row {row}", texts, f"{identity} {row}", config.repeats, found.weight)
        if row < 0:
            faults.append(f"{config.path}: the dataset is empty")

    def contents(self, names: dict[int, str]) -> Iterator[tuple[int, bytes | DataError]]:
        for row in names:
            try:
                cells = self.loaded[row] if hasattr(self.loaded, "__len__") else self._streamed(row)
                yield row, content_of(cells[str(self.config.image_column)])
            except (OSError, tarfile.TarError) as error:
                yield row, DataError(f"cannot be read: {error}")

    def _streamed(self, row: int) -> dict[str, Any]:
        """A row of a stream, which goes on from the row before."""
        if self._stream is None or row < self._position:
            self._stream, self._position = iter(self.loaded), 0
        while self._position < row:
            next(self._stream)
            self._position += 1
        self._position += 1
        return next(self._stream)


def range_of(loaded: Any) -> Iterable[Any]:
    return range(len(loaded)) if hasattr(loaded, "__len__") else loaded


def content_of(cell: Any) -> bytes:
    if cell is None:
        return b""
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
