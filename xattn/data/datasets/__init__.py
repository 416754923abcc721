"""Raw data sets: each file here turns one kind of folder into a stream of samples.

A reader is a module that has the names of `Reader`; it is found by its file name, so adding a data
set is adding a file. Modules whose names start with an underscore are no readers.
"""

import functools
import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, cast, runtime_checkable

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from xattn.data.datasets._files import Entry, check_unique
from xattn.data.stored import ShardSettings
from xattn.errors import DataError, UnknownNameError
from xattn.structures import DatasetInfo, Sample

__all__ = [
    "DatasetConfig",
    "Entry",
    "GeneratingReader",
    "Reader",
    "check_unique",
    "list_readers",
    "load_reader",
    "reader_settings",
    "resolve_root",
    "sample_reader",
]


@runtime_checkable
class Reader(Protocol):
    """The surface of a reader module; `settings` is an instance of its own `Settings`."""

    URL: str
    """Where the data can be had; empty when they are generated or the user's own."""

    LAYOUT: str
    """The expected tree on disk, as a user would draw it."""

    Settings: type[BaseModel]

    def describe(self, root: Path, settings: Any) -> DatasetInfo:
        """Tell what is known of the data set; opens no image."""

    def entries(self, root: Path, split: str, settings: Any) -> list[Entry]:
        """List a split's samples in a stable order, or raise DataError; opens no image."""

    def read(self, entry: Entry, info: DatasetInfo, settings: Any) -> Sample:
        """Read and check one sample, or raise DataError; `info` is what `describe` returned."""


@runtime_checkable
class GeneratingReader(Reader, Protocol):
    """A reader that can make its raw files; does nothing when they are complete."""

    def generate(self, root: Path, settings: Any, on_progress: Callable[[int, int], None]) -> None:
        """Make the raw files under `root`, calling `on_progress(done, total)` after each image."""


def list_readers() -> list[str]:
    """Return the names of all readers, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load_reader(name: str) -> Reader:
    """Return the module of reader `name`.

    Raises:
        UnknownNameError: there is no such file here.
    """
    if name not in list_readers():
        raise UnknownNameError("data set reader", name, list_readers())
    return cast(Reader, importlib.import_module(f"{__name__}.{name}"))


class DatasetConfig(BaseModel, frozen=True, extra="forbid"):
    """Which raw data to read and how.

    Args:
        reader: name of a file in this folder.
        root: the raw folder: absolute, or relative to $XATTN_DATA or the project; only readers
            that generate their files can do without.
        settings: the reader's own knobs, checked by its `Settings`.
        shards: order, size and storage of the shards.
        remote: "s3://bucket/folder" for the shards; the project then keeps only their index. By
            default they lie in data/shards/NAME.
    """

    reader: str
    root: str | None = None
    settings: dict[str, Any] = {}
    shards: ShardSettings = ShardSettings()
    remote: Annotated[str, Field(pattern=r"^s3://[A-Za-z0-9.-]+(/.+)?$")] | None = None

    @field_validator("reader")
    @classmethod
    def _check_reader(cls, value: str) -> str:
        load_reader(value)
        return value

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        # pydantic puts this field's name before the keys of the errors that are raised in here
        if "reader" in info.data:
            _parse_settings(info.data["reader"], value)
        return value


def sample_reader(config: DatasetConfig, info: DatasetInfo) -> Callable[[Entry], Sample]:
    """Return what reads an entry of a data set; it pickles, for the processes that pack shards."""
    return functools.partial(_read, config.reader, info, reader_settings(config))


def _read(reader: str, info: DatasetInfo, settings: BaseModel, entry: Entry) -> Sample:
    return load_reader(reader).read(entry, info, settings)


def reader_settings(config: DatasetConfig) -> BaseModel:
    """Return `config.settings` as the reader's own `Settings`."""
    return _parse_settings(config.reader, config.settings)


def _parse_settings(reader: str, value: dict[str, Any]) -> BaseModel:
    """Validate as params.yaml is: strictly, but a list may fill a tuple."""
    return load_reader(reader).Settings.model_validate_json(json.dumps(value), strict=True)


def resolve_root(config: DatasetConfig, base: Path) -> Path:
    """Find the raw folder of a data set.

    An absolute root is taken as it is. A relative one is looked for under $XATTN_DATA, if that is
    set, then under `base`. A reader that generates its files may name a folder that does not exist
    yet (then it is under `base`) or none (then it is `data/raw/READER` under `base`).

    Args:
        config: names the reader and the root.
        base: the project's folder.

    Raises:
        DataError: there is no such folder; says where it was looked for and what to set.
    """
    reader = load_reader(config.reader)
    generates = isinstance(reader, GeneratingReader)
    if config.root is None:
        if generates:
            return base / "data" / "raw" / config.reader
        raise DataError(
            f"no root is set for the data set reader '{config.reader}'; {_how_to_mend(reader)}"
        )
    shared = os.environ.get("XATTN_DATA")
    root = Path(config.root).expanduser()
    places = [Path(shared) / root] if shared else []
    places = [root] if root.is_absolute() else [*places, base / root]
    for place in places:
        if place.is_dir():
            return place
    if generates:
        return places[-1]
    unset = "" if shared or root.is_absolute() else " (XATTN_DATA is not set)"
    raise DataError(
        f"no raw data for the reader '{config.reader}': looked for the folder"
        f" {' and '.join(str(place) for place in places)}{unset}; {_how_to_mend(reader)}"
    )


def _how_to_mend(reader: Reader) -> str:
    source = f"; the data are at {reader.URL}" if reader.URL else ""
    return (
        f"set datasets.NAME.root in params.yaml to it, or XATTN_DATA to the folder above it{source}"
    )
