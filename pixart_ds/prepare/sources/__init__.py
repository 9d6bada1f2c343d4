"""Where pictures come from: folders, lists, tar and parquet files, on a disk or in an object store."""

from __future__ import annotations

from collections.abc import Callable

from pixart_ds.config.schema import SourceConfig
from pixart_ds.prepare.sources.base import Chunk, Source
from pixart_ds.prepare.sources.folder import FolderSource, ImageNetSource
from pixart_ds.prepare.sources.lists import ListSource
from pixart_ds.prepare.sources.tables import ParquetSource
from pixart_ds.prepare.sources.tars import WebDatasetSource

_KINDS: dict[str, Callable[[SourceConfig], Source]] = {
    "folder": FolderSource,
    "imagenet": ImageNetSource,
    "list": ListSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
}

__all__ = ["Chunk", "Source", "open_source"]


def open_source(config: SourceConfig) -> Source:
    """The source of that kind; it is looked at when it is first asked.

    Raises:
        DataError: An address of a store that is not known.
    """
    return _KINDS[config.kind](config)
