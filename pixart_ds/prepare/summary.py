"""A prepared set on one page, as text and as HTML: what is in it, what was left out, how large it is, and what it looks like."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from pixart_ds.log import duration, si
from pixart_ds.page.charts import Bar, Column, Group, bar_chart, block_chart, column_chart, digits, shortened
from pixart_ds.page.parts import document, figure, section, table, tile
from pixart_ds.page.words import counted, percent
from pixart_ds.prepare.figures import Bin, RowFigures, bins, row_figures
from pixart_ds.prepare.items import Rejected

if TYPE_CHECKING:
    from pixart_ds.data.format import SetDescription

_MOST_NAMES = 5
"""Names that are kept of what was left out for one reason."""
_WIDTH = 116
_MOST_LINES = 8
"""Of one kind that the text lists; the page lists all."""
_WIDEST = 320
"""Pixels of an example's longer side in the page."""
_SMALL = 160
"""Examples whose longer side is shorter are shown with their pixels."""
_LONGEST = 600
"""Characters of an example's caption that are shown."""


@dataclass(frozen=True)
class Skipped:
    """What was left out for one reason: how many, and the first few names."""

    count: int
    names: tuple[str, ...] = ()


def grouped(rejected: Iterable[Rejected]) -> dict[tuple[str, str], Skipped]:
    """What was left out by kind and reason; reasons that differ in their numbers alone are one."""
    found: dict[tuple[str, str], Skipped] = {}
    for each in rejected:
        key = (each.kind, re.sub(r"\d+(?:[.,]\d+)*", "N", each.reason))
        before = found.get(key, Skipped(0))
        names = before.names if before.count >= _MOST_NAMES else (*before.names, each.name)
        found[key] = Skipped(before.count + 1, names)
    return found


@dataclass(frozen=True)
class Example:
    """One picture as the set holds it.

    Attributes:
        picture: (H, W, 3) uint8, decoded from the stored latents.
        caption: Its text.
        name: In the source.
        original: (height, width) in the source.
        crop: Height and width after resizing, then top and left of the cut in that.
        latents: The resolution's name.
        ratio: Height / width of its bucket.
    """

    picture: npt.NDArray[np.uint8]
    caption: str
    name: str
    original: tuple[int, int]
    crop: tuple[int, int, int, int]
    latents: str
    ratio: float


@dataclass(frozen=True)
class Facts:
    """What the summary is made of.

    Attributes:
        path: The set's folder or address.
        description: What its rows are made of.
        rows: Its rows.parquet.
        parts: How many row groups it has.
        folder_bytes: Of `captions` and of each `latents-NAME`.
        seconds: That preparing took; None if several calls shared in it.
        skipped: What was left out, by kind and reason.
        codec_error: Relative L2 error of stored caption features, None where they are stored as they were.
        examples: Pictures to show.
    """

    path: str
    description: SetDescription
    rows: Path | BinaryIO
    parts: int
    folder_bytes: Mapping[str, int]
    seconds: float | None
    skipped: Mapping[tuple[str, str], Skipped] = field(default_factory=dict)
    codec_error: float | None = None
    examples: Sequence[Example] = ()

    @cached_property
    def figures(self) -> RowFigures:
        """Read from the rows once.

        Raises:
            DataError: They lack a column.
        """
        return row_figures(self.rows, self.description)

    @property
    def num_skipped(self) -> int:
        return sum(each.count for each in self.skipped.values())

    @property
    def num_bytes(self) -> int:
        return sum(self.folder_bytes.values())

    @property
    def skipped_share(self) -> float:
        return self.num_skipped / max(1, self.num_skipped + self.figures.samples)

    @property
    def truncated_share(self) -> float:
        return self.figures.truncated / max(1, self.figures.samples)

    @property
    def skipped_first(self) -> list[tuple[str, str, Skipped]]:
        """Kind, reason and what they are, the most frequent first."""
        rows = [(kind, reason, each) for (kind, reason), each in self.skipped.items()]
        return sorted(rows, key=lambda row: (-row[2].count, row[0], row[1]))

    @property
    def caption_bytes(self) -> float:
        """Of one caption's text and features."""
        return self.folder_bytes.get("captions", 0) / max(1, self.figures.samples)

    @property
    def padded_bytes(self) -> dict[str, int]:
        """Bytes of a caption's features as the released code stores them, padded to all tokens, by precision."""
        values = self.description.max_tokens * self.description.caption_channels
        return {"fp16": 2 * values, "fp32": 4 * values}


def text(facts: Facts) -> str:
    """The summary for a terminal and a job's log: at most 60 lines."""
    lines = [f"Prepared set {facts.path}", *_headline(facts), ""]
    lines += [*_buckets_text(facts), "", *_tokens_text(facts), "", *_bytes_text(facts)]
    for more in (_skipped_text(facts), _numbers_text(facts)):
        lines += ["", *more] if more else []
    lines += ["", *_encoders_text(facts)]
    return "\n".join(_clean(line) for line in lines) + "\n"


def _clean(line: str) -> str:
    """Without control characters, which a name may hold and a terminal would obey."""
    return "".join(each if each.isprintable() else "�" for each in line)


def _headline(facts: Facts) -> list[str]:
    found, classes = facts.figures, len(facts.description.classes)
    pace = (
        f", prepared in {duration(facts.seconds)}, {digits(found.samples / facts.seconds)} samples/s"
        if facts.seconds
        else ""
    )
    labelled = f"; {found.labelled:,} have one of {classes:,} classes" if classes else ""
    return [
        f"  {counted(found.samples, 'sample')} in {counted(facts.parts, 'part')}, {_size(facts.num_bytes)}{pace}",
        f"  {facts.num_skipped:,} left out ({percent(facts.skipped_share)}){labelled}",
    ]


def _buckets_text(facts: Facts) -> list[str]:
    ratios, counts = facts.description.ratios, facts.figures.per_bucket
    chart = block_chart(counts.tolist())
    if len(ratios) == 1 or not chart:
        return [f"Buckets: one, height / width {ratios[0]:.2f}"] if len(ratios) == 1 else ["Buckets: all empty"]
    most = int(counts.argmax())
    return [
        f"Buckets, height / width {ratios[0]:.2f} to {ratios[-1]:.2f}: most samples at {ratios[most]:.2f} ({counts[most]:,}), "
        f"{int((counts == 0).sum())} of {len(ratios)} empty",
        *(f"  {line}" for line in chart),
    ]


def _tokens_text(facts: Facts) -> list[str]:
    found, most = facts.figures, facts.description.max_tokens
    held = bins(found.per_tokens, 60)
    lines = [
        f"Tokens of a caption: mean {found.mean_tokens:.1f}, at most {found.most_tokens} of {most}; "
        f"{percent(facts.truncated_share)} cut ({found.truncated:,})"
    ]
    if len(held) > 1:
        lines[0] += f"; from {held[0].low} to {found.most_tokens}:"
        lines += [f"  {line}" for line in block_chart([each.count for each in held])]
    if found.without_words:
        lines.append(f"  {_without_words(facts)}")
    return lines


def _without_words(facts: Facts) -> str:
    made = ": empty, or written in signs that captions.clean removes" if facts.description.clean_captions else ": empty"
    return f"{counted(facts.figures.without_words, 'caption')} without a word{made}"


def _bytes_text(facts: Facts) -> list[str]:
    lines = []
    for name, size in sorted(facts.folder_bytes.items()):
        each = size / max(1, facts.figures.samples)
        lines.append(f"{shortened(name, 32):<32} {_size(size):>9} {each:>12,.0f} a sample{_cut_text(facts, name)}")
    padded = ", ".join(f"{size:,} in {precision}" for precision, size in facts.padded_bytes.items())
    most = facts.description.max_tokens
    return [*_listed("Bytes", lines), f"  a caption padded to {most} tokens, as the released code stores it: {padded}"]


def _cut_text(facts: Facts, folder: str) -> str:
    cut = facts.figures.cuts.get(folder.removeprefix("latents-"))
    if cut is None or folder == "captions":
        return ""
    enlarged = percent(cut.enlarged / max(1, facts.figures.samples))
    return f"; {percent(cut.kept)} of a picture is inside its cut, {enlarged} were enlarged"


def _skipped_text(facts: Facts) -> list[str]:
    lines = []
    for kind, reason, each in facts.skipped_first:
        names = ", ".join(shortened(name, 40) for name in each.names[:2])
        more = ", …" if each.count > 2 else ""
        line = f"{each.count:,} {kind}: {reason} ({names}{more})"
        lines.append(textwrap.shorten(line, _WIDTH - 2, placeholder=" …"))
    return _listed("Left out", lines)


def _numbers_text(facts: Facts) -> list[str]:
    lines = []
    for name, each in sorted(facts.figures.numbers.items()):
        have = percent(each.count / max(1, facts.figures.samples))
        told = f"{digits(each.low)} to {digits(each.high)}, mean {digits(each.mean)}; {have} have it"
        lines.append(f"{shortened(name, 32):<32} {told}")
    return _listed("Numbers of the source", lines)


def _encoders_text(facts: Facts) -> list[str]:
    width = max(len(name) for name, _ in _made_with(facts))
    return ["Made with", *(f"  {name:<{width}}  {shortened(value, 90)}" for name, value in _made_with(facts))]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    """The first few lines under their title, and how many more there are; nothing without any."""
    more = [f"  and {len(lines) - _MOST_LINES:,} more"] if len(lines) > _MOST_LINES else []
    return [title, *(f"  {line}" for line in lines[:_MOST_LINES]), *more] if lines else []


def _made_with(facts: Facts) -> list[tuple[str, str]]:
    """What the set says of how it was made: names and values."""
    about = facts.description
    shift = f", shift {about.shift_factor:g}" if about.shift_factor else ""
    error = "" if facts.codec_error is None else f", relative L2 error {facts.codec_error:.2%}"
    cleaned = "cleaned" if about.clean_captions else "not cleaned"
    return [
        ("source", about.source),
        ("captions", f"by {about.captioner}" if about.captioner != "source" else "the source's"),
        ("before encoding", cleaned),
        ("VAE", f"{about.vae} ({about.vae_fingerprint}), {about.vae_precision}"),
        (
            "latents",
            f"{about.latent_channels} channels, 1/{about.downsampling_factor}, scale {about.scaling_factor:g}{shift}",
        ),
        ("text encoder", f"{about.text_encoder} ({about.text_fingerprint}), {about.text_precision}"),
        ("caption features", f"{about.caption_channels} channels, stored as {about.caption_codec}{error}"),
    ]


def _size(count: float) -> str:
    """Bytes as 12.3 GB."""
    return si(count, "B")


def html(facts: Facts) -> str:
    """The summary as a page that needs no network, in light and dark, for screens and for paper."""
    about = facts.description
    name = facts.path.rstrip("/").rsplit("/", 1)[-1]
    header = f"<p>{escape(facts.path)}</p><p>from {escape(about.source)}</p>"
    sections = [
        section("tiles", "", _tiles(facts)),
        section("examples", "What it looks like", _examples(facts.examples)),
        section("buckets", "Aspect ratios", _buckets(facts)),
        section("captions", "Captions", _captions(facts)),
        section("pictures", "Pictures", _pictures(facts)),
        section("bytes", "Bytes", _bytes(facts)),
        section("skipped", "Left out", _skipped(facts)),
        section("numbers", "Numbers of the source", _numbers(facts)),
        section("made", "Made with", table("", [], [list(each) for each in _made_with(facts)], left=2)),
    ]
    return document(f"Prepared set {name}", header, sections, _STYLE)


def _tiles(facts: Facts) -> str:
    found = facts.figures
    each = facts.num_bytes / max(1, found.samples)
    made = [
        tile("samples", f"{found.samples:,}", f"in {counted(facts.parts, 'part')}"),
        tile("bytes", _size(facts.num_bytes), f"{_size(each)} a sample"),
        tile("left out", f"{facts.num_skipped:,}", f"{percent(facts.skipped_share)} of the source"),
        tile("tokens of a caption", f"{found.mean_tokens:.1f}", f"mean; at most {found.most_tokens}"),
        tile(
            "captions cut",
            percent(facts.truncated_share),
            f"{found.truncated:,}, at {facts.description.max_tokens} tokens",
        ),
    ]
    if facts.seconds:
        made.append(tile("prepared in", duration(facts.seconds), f"{digits(found.samples / facts.seconds)} samples/s"))
    return f'<div class="tiles">{"".join(made)}</div>'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    note = (
        "Decoded from the stored latents. The small drawing shows how the picture was cut: the whole as it was resized, and in "
        "it what the set holds. Sizes are height × width."
    )
    return f'<p class="note">{note}</p><div class="examples">{"".join(_example(each) for each in examples)}</div>'


def _example(example: Example) -> str:
    height, width = example.picture.shape[:2]
    resized_height, resized_width, top, left = example.crop
    pixels = ' class="pixels"' if max(height, width) < _SMALL else ""
    caption = example.caption if len(example.caption) <= _LONGEST else f"{example.caption[:_LONGEST]}…"
    drawing = (
        f'<svg class="cut" viewBox="0 0 {resized_width} {resized_height}" role="img" aria-label="how it was cut">'
        f'<rect class="whole" width="{resized_width}" height="{resized_height}"/>'
        f'<rect class="kept" x="{left}" y="{top}" width="{width}" height="{height}"/></svg>'
    )
    lines = (
        f"{example.latents}, ratio {example.ratio:.2f}",
        f"original {example.original[0]} × {example.original[1]}",
        f"resized {resized_height} × {resized_width}",
        f"cut {height} × {width}, top {top}, left {left}",
    )
    return (
        f'<figure><div class="frame"><img{pixels} src="{_uri(example.picture)}" alt="{escape(caption[:200])}"></div>'
        f'<p class="caption">{escape(caption)}</p><div class="how">{drawing}<p class="note">'
        f"{'<br>'.join(escape(line) for line in lines)}</p></div>"
        f'<p class="note">{escape(shortened(example.name, 120))}</p></figure>'
    )


def _uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A small picture as a data: URI, without loss where that is small."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_WIDEST, _WIDEST))
    kind, choices = ("png", {"optimize": True}) if max(picture.size) < _SMALL else ("jpeg", {"quality": 85})
    held = io.BytesIO()
    picture.save(held, kind, **choices)
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"


def _buckets(facts: Facts) -> str:
    about, counts = facts.description, facts.figures.per_bucket
    rows, columns = [], []
    for number, (ratio, count) in enumerate(zip(about.ratios, counts.tolist(), strict=True)):
        share = percent(count / max(1, facts.figures.samples))
        columns.append(
            Column(f"{ratio:.2f}", count, f"height / width {ratio:.2f}: {counted(count, 'sample')}, {share}")
        )
        sizes = [info.sizes[0 if info.square else number] for info in about.latents.values()]
        pixels = [_pixels(about, size) for size in sizes]
        rows.append([f"{ratio:.2f}", f"{count:,}", share, *pixels])
    rows.append(["all", f"{facts.figures.samples:,}", "", *("" for _ in about.latents)])
    heads = ["height / width", "samples", "share", *(f"{name}, pixels" for name in about.latents)]
    chart = figure("Samples by height / width", column_chart(columns, "Samples of each aspect ratio"))
    return chart + table("Buckets", heads, rows, left=1, total=True, fold=len(rows) > 12)


def _pixels(about: SetDescription, size: tuple[int, int]) -> str:
    """Height × width in pixels of latents of this size."""
    return " × ".join(str(about.downsampling_factor * side) for side in size)


def _captions(facts: Facts) -> str:
    found = facts.figures
    held = bins(found.per_tokens, 40)
    tokens = _histogram("Tokens of a caption", held, "token", "caption")
    if found.without_words:
        tokens = f'<div>{tokens}<p class="note">{_without_words(facts)}.</p></div>'
    ours, padded = facts.caption_bytes, facts.padded_bytes
    most = facts.description.max_tokens
    groups = [Group("this set", f"{ours:,.0f}", [Bar("blue", ours, f"this set: {ours:,.0f} bytes")])]
    for precision, size in padded.items():
        words = f"{size:,} ({size / ours:.1f} times)" if ours else f"{size:,}"
        groups.append(Group(f"padded, {precision}", words, [Bar("grey", size, f"padded, {precision}: {size:,} bytes")]))
    note = f'<p class="note">Beside features that are padded to {most} tokens, as the released code stores them.</p>'
    beside = figure("Bytes of a caption", bar_chart(groups, "Bytes of a caption", log=False) + note)
    return f'<div class="columns">{tokens}{beside}</div>'


def _histogram(title: str, held: Sequence[Bin], unit: str, what: str) -> str:
    columns = []
    for each in held:
        wide = each.high is None or each.high > each.low
        name = f"{each.low}+" if each.high is None else str(each.low)
        span = f"{each.low} or more" if each.high is None else f"{each.low} to {each.high}" if wide else f"{each.low}"
        columns.append(Column(name, each.count, f"{span} {unit}s: {counted(each.count, what)}"))
    return figure(title, column_chart(columns, f"{what}s by {unit}s", room=420)) if columns else ""


def _pictures(facts: Facts) -> str:
    found, about = facts.figures, facts.description
    sides = _histogram(
        "Shorter side of the originals, in pixels", bins(found.per_side, 40, outliers=0.005), "pixel", "picture"
    )
    rows = []
    for name, cut in found.cuts.items():
        sizes = about.latents[name].sizes
        pixels = (
            _pixels(about, sizes[0]) if len(sizes) == 1 else f"{_pixels(about, sizes[0])} … {_pixels(about, sizes[-1])}"
        )
        rows.append([name, pixels, percent(cut.kept), percent(cut.enlarged / max(1, found.samples))])
    heads = ["latents", "pixels", "inside the cut, mean", "enlarged"]
    note = (
        '<p class="note">Inside the cut: the share of a resized picture that the set holds. Enlarged: originals that are smaller '
        "than what they were resized to.</p>"
    )
    cuts = table("How they were cut", heads, rows, left=2)
    return f'<div class="columns">{sides}<div>{cuts}{note if cuts else ""}</div></div>'


def _bytes(facts: Facts) -> str:
    samples = max(1, facts.figures.samples)
    whole = max(1, facts.num_bytes)
    rows = [
        [name, f"{size:,}", _size(size), percent(size / whole), f"{size / samples:,.0f}"]
        for name, size in sorted(facts.folder_bytes.items())
    ]
    rows.append(["all", f"{facts.num_bytes:,}", _size(facts.num_bytes), "", f"{facts.num_bytes / samples:,.0f}"])
    return table("By folder", ["folder", "bytes", "", "share", "bytes a sample"], rows, left=1, total=True)


def _skipped(facts: Facts) -> str:
    if not facts.skipped:
        return "<p>Nothing was left out.</p>"
    rows = []
    for kind, reason, each in facts.skipped_first:
        names = ", ".join(shortened(name, 80) for name in each.names)
        rows.append([f"{each.count:,}", kind, reason, names + (", …" if each.count > len(each.names) else "")])
    made = table("", ["pictures", "kind", "reason", "for example"], rows, left=4)
    return f'<div class="reasons">{made}</div><p class="note">Each one is listed in skipped.jsonl.</p>'


def _numbers(facts: Facts) -> str:
    rows = []
    for name, each in sorted(facts.figures.numbers.items()):
        have = percent(each.count / max(1, facts.figures.samples))
        rows.append([name, digits(each.low), digits(each.mean), digits(each.high), f"{each.count:,}", have])
    return table("", ["number", "least", "mean", "most", "samples that have it", "share"], rows, left=1)


_STYLE = """
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); gap: 18px; }
.examples figure { margin: 0; }
.examples p { margin: 6px 0 0; overflow-wrap: anywhere; }
.frame { aspect-ratio: 1; border-radius: 6px; background: var(--grid); }
.frame img { width: 100%; height: 100%; object-fit: contain; background: none; }
.frame .pixels { image-rendering: pixelated; }
.caption { font-size: 13px; line-height: 1.35; }
.how { display: flex; align-items: center; gap: 10px; margin-top: 6px; }
.how .note, .examples > figure > .note { font-size: 12px; line-height: 1.3; margin: 0; }
.cut { flex: none; width: 56px; height: 56px; overflow: visible; }
.cut rect { vector-effect: non-scaling-stroke; stroke-width: 1.5px; }
.whole { color: var(--track); stroke: var(--faint); }
.kept { fill: var(--blue); fill-opacity: .35; stroke: var(--blue); }
.reasons td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 5em; }
figcaption:empty { display: none; }
@media (min-width: 1001px) { .tiles { grid-template-columns: repeat(6, 1fr); } }
.facts td { vertical-align: top; }
@media (max-width: 560px) { .examples { grid-template-columns: repeat(2, 1fr); gap: 14px; } .how { display: block; } }
@media print { .examples { grid-template-columns: repeat(4, 1fr); } .examples figure { break-inside: avoid; }
  .how { display: block; } .caption { font-size: 9px; } .tiles { grid-template-columns: repeat(6, 1fr); } }
"""
