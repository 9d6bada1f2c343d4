"""Tar files as webdataset writes them: members of one stem are one sample."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

from pixart_ds.config.schema import SourceConfig
from pixart_ds.data.store import is_remote
from pixart_ds.errors import DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Place, Rejected
from pixart_ds.prepare.pictures import is_picture, size_of
from pixart_ds.prepare.sources.base import (
    BLOCK_BYTES,
    HEADER_BYTES,
    Chunk,
    Files,
    caption_key_of,
    caption_of,
    class_of,
    find_files,
    numbers_of,
    tidy,
)

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LARGEST_TEXT = 16 << 20
_BLOCK = 512
_LONGEST_END = 1 << 20
"""Of the zeros behind the last member, which fill a record: usually of 10 KiB."""
_MAGIC = slice(257, 262)
"""Where a member's header says that it is one."""


@dataclass
class _Sample:
    """Members that have one stem.

    Attributes:
        stem: Their path without what follows the first dot of its last part.
        picture: Member name, offset, bytes, height and width.
        problem: Why the picture cannot be taken.
        texts: Content of the other members that are read, by what follows the first dot.
    """

    stem: str
    picture: tuple[str, int, int, int, int] | None = None
    problem: tuple[str, str] | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


class WebDatasetSource:
    """Samples of a picture, its caption in a .txt or .json, its class in a .cls, numbers in the .json."""

    random_access = True

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    @property
    def root(self) -> str:
        return self._files.root

    @cached_property
    def _files(self) -> Files:
        endings = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
        files = find_files(self.config, endings, "tar files")
        for name in files.sizes:
            if not name.lower().endswith(".tar") and name.lower().endswith(endings):
                raise _compressed(files, name, "")
        return files

    def chunks(self) -> list[Chunk]:
        """A tar is a chunk."""
        return [Chunk(name, name) for name in self._files.sizes]

    def listing(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, size in self._files.sizes.items():
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def scan(self, chunk: Chunk) -> Iterator[Item | Rejected]:
        name = chunk.content
        block = BLOCK_BYTES if is_remote(self._files.root) else HEADER_BYTES
        if not self._files.sizes[name]:
            yield Rejected(name, "broken", "the tar file is empty")
            return
        with self._files.open(name, block) as file:
            begin = file.peek(8)
            for magic, kind in _COMPRESSED.items():
                if begin.startswith(magic):
                    raise _compressed(self._files, name, f" by {kind}")
            seen: set[str] = set()
            for made in self._members(name, file):
                twice = isinstance(made, Item) and made.name in seen
                seen.add(made.name)
                yield Rejected(made.name, "broken", "the tar file holds it twice") if twice else made

    def _members(self, tar_name: str, file: IO[bytes]) -> Iterator[Item | Rejected]:
        count = 0
        sample: _Sample | None = None
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    count += 1
                    if member.isdir():
                        continue
                    if (reason := _refused(member)) is not None:
                        yield Rejected(f"{tar_name}/{member.name}", "broken", reason)
                        continue
                    stem, ending = _split(member.name)
                    if sample is None or sample.stem != stem:
                        if sample is not None:
                            yield from self._made(tar_name, sample)
                        sample = _Sample(stem)
                    self._take(sample, tar_name, member, ending, tar)
                flaw = _behind(file, tar.offset)
        except tarfile.TarError as cause:
            flaw = str(cause)
        if sample is not None:
            yield from self._made(tar_name, sample)
        if flaw is not None:
            yield Rejected(
                tar_name,
                "broken",
                f"the tar file is damaged behind its first {count} members: {flaw}; the rest is lost",
            )

    def _take(self, sample: _Sample, tar_name: str, member: tarfile.TarInfo, ending: str, tar: tarfile.TarFile) -> None:
        """Reads of a member what is needed."""
        name = posixpath.normpath(member.name)
        if is_picture(f"x.{ending}") and "." not in ending:
            if sample.picture is not None or sample.problem is not None:
                sample.picture, sample.problem = None, (name, "its sample holds two pictures")
                return
            try:
                if member.offset_data + member.size > self._files.sizes[tar_name]:
                    raise BrokenPicture("the tar file ends before it does")
                height, width = self._measure(tar, member)
                sample.picture = (name, member.offset_data, member.size, height, width)
            except BrokenPicture as error:
                sample.problem = (name, str(error))
        elif f".{ending}" in (self.config.caption_suffix, ".json", ".cls") and member.size <= _LARGEST_TEXT:
            content = tar.extractfile(member)
            assert content is not None
            sample.texts[f".{ending}"] = content.read()

    def _measure(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, int]:
        if not member.size:
            raise BrokenPicture("it is empty")
        content = tar.extractfile(member)
        assert content is not None
        if not is_remote(self._files.root):
            return size_of(content)
        return size_of(content.read())  # going back in a stored file would be a request for each step

    def _made(self, tar_name: str, sample: _Sample) -> Iterator[Item | Rejected]:
        if sample.problem is not None:
            yield Rejected(f"{tar_name}/{sample.problem[0]}", "broken", sample.problem[1])
            return
        if sample.picture is None:
            yield Rejected(f"{tar_name}/{sample.stem}", "broken", "its sample holds no picture")
            return
        member, start, length, height, width = sample.picture
        name = f"{tar_name}/{member}"
        try:
            about = json.loads(sample.texts.get(".json", b"{}"))
            if not isinstance(about, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            yield Rejected(name, "caption", f"its .json cannot be read: {error}")
            return
        try:
            caption = self._caption(sample, about)
            label = sample.texts[".cls"].decode() if ".cls" in sample.texts else None
        except UnicodeDecodeError as error:
            yield Rejected(name, "caption", f"its caption is not UTF-8: {error}")
            return
        yield Item(
            name,
            Place(tar_name, start, length),
            height,
            width,
            caption,
            tidy(label) if self.config.class_key is None else class_of(about, self.config.class_key),
            numbers_of(about, caption_key_of(about, self.config.caption_key), self.config.class_key),
        )

    def _caption(self, sample: _Sample, about: dict[str, Any]) -> str | None:
        """The text member's, unless the recipe names a key of the JSON member or there is no such text."""
        text = sample.texts.get(self.config.caption_suffix)
        if text is None or self.config.caption_key is not None or self.config.caption_suffix == ".json":
            return caption_of(about, self.config.caption_key)
        return tidy(text.decode("utf-8-sig"))

    def read(self, place: Place) -> bytes:
        return self._files.store.read_range(place.container, place.start, place.length)

    def titles(self, class_keys: Iterable[str]) -> list[str]:
        return list(class_keys)


def _compressed(files: Files, name: str, how: str) -> DataError:
    return DataError(
        f"{name} is compressed{how}: pictures inside cannot be read one by one",
        where=files.root,
        remedy="unpack it to a plain .tar (pictures are compressed already), for example with gunzip",
    )


def _refused(member: tarfile.TarInfo) -> str | None:
    """Why a member is not looked at."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "its name leads out of the tar file"
    if not member.isreg() or member.issparse():
        return "it is a link, a device or has holes, not a plain file"
    return None


def _split(name: str) -> tuple[str, str]:
    """The stem of a member, and what follows the first dot of its last part, in small letters."""
    folder, slash, last = posixpath.normpath(name).rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _behind(file: IO[bytes], offset: int) -> str | None:
    """What is wrong behind a tar's last member, where zeros or the file's end ought to be."""
    file.seek(offset)
    if any(file.read(_BLOCK)):
        return "what follows is no tar"
    rest = file.read(_LONGEST_END)
    start = (len(rest) - len(rest.lstrip(b"\0"))) // _BLOCK * _BLOCK
    if rest[start:][_MAGIC] == b"ustar":
        return "another one follows its end, as where cat joined several (tar --concatenate joins them to one)"
    return None
