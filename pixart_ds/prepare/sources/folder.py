"""Pictures in folders, with a caption file beside each; and ImageNet, a folder for each class."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pixart_ds.config.schema import SourceConfig
from pixart_ds.data.store import is_remote, open_store
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Place, Rejected
from pixart_ds.prepare.pictures import SUFFIXES, is_picture
from pixart_ds.prepare.sources.base import ENTRIES_PER_CHUNK, Chunk, Pictures, in_order, is_hidden, pack, tidy, unpack


class FolderSource:
    """Pictures NAME.png, … with NAME.txt (or another suffix) beside each; the folder that a picture lies in is its class.

    Hidden files are left out. Linked folders are not entered, but listed as broken.
    """

    random_access = True

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.pictures = Pictures(config.path)

    @property
    def root(self) -> str:
        return self.pictures.root

    def chunks(self) -> list[Chunk]:
        return self._listed[0]

    def listing(self) -> str:
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[list[Chunk], str]:
        self._check_root()
        digest = hashlib.blake2b(digest_size=16)
        self._add_to_listing(digest)
        chunks: list[Chunk] = []
        entries = self._entries(digest)
        while batch := list(itertools.islice(entries, ENTRIES_PER_CHUNK)):
            chunks.append(Chunk(f"{batch[0][0]} to {batch[-1][0]}", pack(batch)))
        if not chunks:
            raise DataError(
                "the folder holds no picture", where=self._where, remedy=f"put pictures there ({', '.join(SUFFIXES)})"
            )
        return chunks, digest.hexdigest()

    def _check_root(self) -> None:
        if not self.config.caption_suffix.startswith("."):
            raise ConfigError(
                f"source.caption_suffix: begins with a dot, unlike {self.config.caption_suffix!r}", where="the recipe"
            )
        if not is_remote(self.root) and not Path(self.root).is_dir():
            raise DataError(
                "there is no folder of pictures",
                where=self._where,
                remedy="correct `source.path` in the prepare recipe",
            )

    @property
    def _where(self) -> str:
        return self.root if is_remote(self.root) else os.path.abspath(self.root)

    def _add_to_listing(self, digest: Any) -> None:
        """What else is read, besides the folder."""

    def _entries(self, digest: Any) -> Iterator[tuple[str, int, bool]]:
        """(name, bytes, whether there is a caption file) of all pictures, in a fixed sequence."""
        listed = ((name, size) for name, size in self.pictures.store.names() if not is_hidden(name))
        for here in _together(listed):
            found = [name for name in here if self._is_entry(name, here[name])]
            captions = {name: self._caption_name(name) in here for name in found}
            read = sorted({*found, *(self._caption_name(name) for name in found if captions[name])})
            for name in read:
                digest.update(f"{name}\0{here[name]}\0".encode("utf-8", "surrogateescape"))
            self._check_doubles([name for name in found if captions[name]])
            for name in found:
                yield name, here[name], captions[name]

    def _is_entry(self, name: str, size: int) -> bool:
        return is_picture(name) or (size == 0 and self.pictures.is_linked_folder(name))

    def _caption_name(self, name: str) -> str:
        return posixpath.splitext(name)[0] + self.config.caption_suffix

    def _check_doubles(self, names: list[str]) -> None:
        stems = Counter(posixpath.splitext(name)[0] for name in names)
        double = next((stem for stem, times in stems.items() if times > 1), None)
        if double is not None:
            raise DataError(
                f"two pictures share one caption: {double}.*",
                where=self._where,
                remedy="rename one of them, with a caption of its own",
            )

    def scan(self, chunk: Chunk) -> Iterator[Item | Rejected]:
        yield from in_order(self._item, unpack(chunk.content), self.pictures.threads)

    def _item(self, entry: list[Any]) -> Item | Rejected:
        name, size, has_caption = entry
        try:
            if not is_picture(name):
                raise BrokenPicture("it is a link to a folder, which is not followed")
            if self.pictures.is_link(name):
                self.pictures.check_links(name)
            length, height, width = self.pictures.measure(name, size)
        except BrokenPicture as error:
            return Rejected(name, "broken", str(error))
        try:
            caption = self._caption(name) if has_caption else None
        except BrokenPicture as error:
            return Rejected(name, "caption", f"its caption {self._caption_name(name)} is not read: {error}")
        except UnicodeDecodeError as error:
            return Rejected(name, "caption", f"its caption is not UTF-8: {error}")
        return Item(name, Place(name, 0, length), height, width, caption, self._class_key(name))

    def _caption(self, name: str) -> str | None:
        path = self._caption_name(name)
        if self.pictures.is_link(path):  # else the text of any file would end up in the set
            self.pictures.check_links(path)
        return tidy(self.pictures.store.read(path).decode("utf-8-sig"))

    def _class_key(self, name: str) -> str:
        folder = posixpath.basename(posixpath.dirname(name))
        return folder or posixpath.basename(self.pictures.store.url.rstrip("/")) or "."

    def read(self, place: Place) -> bytes:
        return self.pictures.read(place)

    def titles(self, class_keys: Iterable[str]) -> list[str]:
        return list(class_keys)


def _together(listed: Iterable[tuple[str, int]]) -> Iterator[dict[str, int]]:
    """Files whose paths are the same up to the first dot of the last part, so a picture and its captions. In a sorted listing they
    stand in a row, but for folders such as NAME.d; no more than that is held.
    """
    waiting: list[tuple[str, dict[str, int]]] = []
    for name, size in listed:
        while waiting and not name.startswith(f"{waiting[-1][0]}."):
            yield waiting.pop()[1]
        folder, slash, last = name.rpartition("/")
        begin = folder + slash + last.partition(".")[0]
        if not waiting or waiting[-1][0] != begin:
            waiting.append((begin, {}))
        waiting[-1][1][name] = size
    while waiting:
        yield waiting.pop()[1]


class ImageNetSource(FolderSource):
    """ROOT/n01440764/*.JPEG: the folder is the class, so that classes are numbered as everybody numbers them; its title is the
    caption.
    """

    def _add_to_listing(self, digest: Any) -> None:
        digest.update(json.dumps(self._titles).encode())

    def _is_entry(self, name: str, size: int) -> bool:
        if not super()._is_entry(name, size):
            return False
        if is_picture(name):
            self._check_class(name)
        return True

    def _caption_name(self, name: str) -> str:
        return ""  # of no file

    def _check_class(self, name: str) -> None:
        folder = name.partition("/")[0]
        if name.count("/") != 1:
            raise DataError(
                f"a picture does not lie in the folder of a class: {name}",
                where=self._where,
                remedy="move it away, or use `kind: folder`; source.path is the folder with the folders of all classes",
            )
        if self._titles and folder not in self._titles:
            raise DataError(
                f"the folder {folder} is no class of {self.config.class_names}",
                where=self._where,
                remedy="move it away, or correct source.class_names",
            )

    @cached_property
    def _titles(self) -> dict[str, str]:
        """The title of each folder's class; empty where folders' names are the titles."""
        path = self.config.class_names
        if path is None:
            return {}
        folder, _, name = path.rpartition("/")
        try:
            text = open_store(folder or ("/" if path.startswith("/") else ".")).read(name).decode()
            return _titles_of(text)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as cause:
            raise DataError(
                f"class names cannot be read: {cause}",
                where=path,
                remedy='write lines `n01440764 tench, Tinca tinca`, or JSON {"0": ["n01440764", "tench"], …}',
            ) from cause

    def _item(self, entry: list[Any]) -> Item | Rejected:
        made = super()._item(entry)
        if isinstance(made, Rejected):
            return made
        (title,) = self.titles([made.class_key or ""])
        return Item(made.name, made.place, made.height, made.width, title.replace("_", " "), made.class_key)

    def titles(self, class_keys: Iterable[str]) -> list[str]:
        return [self._titles.get(key, key) for key in class_keys]


def _titles_of(text: str) -> dict[str, str]:
    """Titles by folder, from either form."""
    if text.lstrip().startswith("{"):
        return {str(folder): str(title) for folder, title in json.loads(text).values()}
    titles = {}
    for line in text.splitlines():
        if line.strip():
            folder, title = line.split(maxsplit=1)
            titles[folder] = title.strip()
    return titles
