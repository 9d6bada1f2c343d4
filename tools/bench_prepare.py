#!/usr/bin/env python
"""Times `pixart-ds prepare`, by phase, beside the released code's way made anew: one picture, one caption at a time, padded, fp32.

Both take the same pictures, captions and encoders, in turns; the encoders are loaded once, before anything is timed. In the whole
the peer is the better of two: in one thread, and as the released code does, with captions in 20 threads that share the encoder and
pictures for buckets read ahead by 13. Phases are those of the main thread and add up to the whole; those of the peer are of its one
thread. What our threads read ahead costs CPU, which is told beside.

    python tools/bench_prepare.py                                              the demo's encoders, on a CPU
    python tools/bench_prepare.py --device cuda --real-sizes --pixels 1024     encoders of the paper's sizes, of random numbers
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.config.schema import CaptionsConfig, LatentsConfig, PrepareConfig, SourceConfig
from pixart_ds.data.codecs import CODECS
from pixart_ds.data.mds import FolderSource
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.writer import SetWriter
from pixart_ds.demo.pictures import draw, scenes
from pixart_ds.encoders import clean
from pixart_ds.encoders.fingerprint import PRECISIONS
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder, keep_in_fp32
from pixart_ds.plan.buckets import nearest_of
from pixart_ds.prepare import finish, pipeline
from pixart_ds.prepare.encode import PictureReader

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "pixart_ds/demo/encoders"
MAX_TOKENS, PAPER_CHANNELS = 120, 4096
CAPTION_THREADS, READERS = 20, 13
RATIOS = (0.5, 0.75, 1.0, 1.33, 2.0)
PHASES = {
    "scan": "list, read headers",
    "plan": "assign to parts",
    "read": "wait for read, decode, cut",
    "vae": "VAE encode",
    "clean": "clean captions",
    "text": "tokenise, T5 encode",
    "write_captions": "write captions",
    "write_latents": "write latents",
    "write_markers": "check, write markers",
    "finish": "join parts",
    "page": "page of 24 examples",
    "other": "everything else",
}
OF_PICTURES, OF_CAPTIONS = ("read", "vae", "write_latents"), ("clean", "text", "write_captions")
_WORD_LIST = """
a the its his her this each several two three one large small bright dark warm soft old young tall distant calm busy
quiet colourful wooden red blue green golden white black stone glass metal woman man child dog cat bird horse boat
train bicycle car table chair window door street market bridge river lake mountain forest field garden flower tree
cloud sky sunset shadow light reflection building tower church castle painting photograph portrait landscape
background foreground stands sits walks rests holds wears shows features creates adds suggests surrounds fills
overlooks reflects covers beside above below behind near across within against along gently slightly clearly closely
together elegantly peacefully
"""
WORDS = _WORD_LIST.split()


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.one:  # a process of its own, whose memory is measured
        print(json.dumps(one_pass(options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-prepare-", dir=options.folder) as name:
        folder = Path(name)
        texts = write_source(folder / "pictures", options.pictures, options.pixels, options.words)
        models = Models.make(folder / "encoders", options)
        answer = measure(folder, models, options)
        answer |= bytes_of_captions(models, texts, answer.pop("stored"))
        answer["by_batch"] = by_batch(folder, models, texts, options)
        del models
        gc.collect()
        torch.cuda.empty_cache()  # both other processes need as much
        answer["memory_mb"] = memory(folder)
    print(json.dumps(answer, indent=2) if options.json else _words(answer))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument(
        "--pixels",
        type=int,
        default=512,
        help="side of a picture's area; latents are at a quarter, square, and at half of it",
    )
    parser.add_argument("--words", type=int, default=85, help="of a caption, in the mean")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds after one that warms up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, else fp16")
    parser.add_argument("--codec", choices=tuple(CODECS), default="fp16", help="of our captions")
    parser.add_argument("--rows-per-group", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 32], help="at which the encoders alone are timed"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--real-sizes", action="store_true", help="encoders of the paper's sizes, of random numbers")
    parser.add_argument("--t5-layers", type=int, default=24, help="of --real-sizes")
    parser.add_argument("--t5-width", type=int, default=PAPER_CHANNELS, help="of --real-sizes, a multiple of 64")
    parser.add_argument("--vae-width", type=int, default=128, help="of --real-sizes, a multiple of 32")
    parser.add_argument("--folder", type=Path, help="where all is written (default: the system's temporary folder)")
    parser.add_argument("--one", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--json",
        action="store_true",
        help="pictures_per_s, captions_per_s, ratio_pictures, ratio_captions and all else",
    )
    return parser


# ---- pictures and captions --------------------------------------------------------------------------------------------


def write_source(folder: Path, count: int, pixels: int, words: int) -> list[str]:
    """Pictures as JPEG, with a photograph's grain, which takes time to decode, and a caption beside each; returns the captions."""
    from PIL import Image

    folder.mkdir(parents=True)
    random, texts = np.random.default_rng(0), []
    for number, scene in enumerate(scenes(count, 0)):
        ratio = RATIOS[number % len(RATIOS)]
        height, width = round(pixels * ratio**0.5), round(pixels / ratio**0.5)
        small = Image.fromarray(draw(scene, random, max(16, height // 8), max(16, width // 8)))
        large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, 8, (height, width, 1)).astype(np.float32)
        picture = Image.fromarray((large + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:06d}.jpg", quality=90)
        texts.append(long_caption(random, words))
        (folder / f"{number:06d}.txt").write_text(texts[-1])
    return texts


def long_caption(random: np.random.Generator, words: int) -> str:
    """Sentences of 8 to 18 words, about as long as a vision-language model's."""
    left, sentences = max(4, round(random.normal(words, words / 4))), []
    while left > 0:
        count = min(left, int(random.integers(8, 19)))
        picked = [WORDS[place] for place in random.integers(len(WORDS), size=count)]
        picked[count // 2] += "," if count > 6 else ""
        sentences.append(" ".join(picked).capitalize() + ".")
        left -= count
    return " ".join(sentences)


def recipe(folder: Path, output: Path, options: argparse.Namespace) -> PrepareConfig:
    """Squares of a quarter of the pictures' side and buckets of a half: 256 and 512 of 1024."""
    side, step = options.pixels // 2, 16
    sizes = tuple((_multiple(side * ratio**0.5, step), _multiple(side / ratio**0.5, step)) for ratio in RATIOS)
    precision = _precision(options)
    return PrepareConfig(
        source=SourceConfig(path=str(folder / "pictures")),
        output=str(output),
        captions=CaptionsConfig(clean=True),
        vae=str(folder / "encoders/vae"),
        vae_precision=precision,
        text_encoder=str(folder / "encoders/text"),
        text_precision=precision,
        caption_codec=options.codec,
        max_tokens=MAX_TOKENS,
        ratios=RATIOS,
        latents=(
            LatentsConfig(name="square", square=_multiple(side / 2, step)),
            LatentsConfig(name="buckets", sizes=sizes),
        ),
        rows_per_group=options.rows_per_group,
        batch_size=options.batch_size,
    )


def _multiple(value: float, step: int) -> int:
    return max(step, round(value / step) * step)


def _precision(options: argparse.Namespace) -> Any:
    return options.precision or ("fp32" if options.device == "cpu" else "fp16")


# ---- encoders ---------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """Both encoders, in memory, and a tokenizer.

    Attributes:
        vae, text: Modules on their device, in their precision.
        tokenizer: Of the text encoder.
        loads: How often `prepare` asked for each since it was last looked at.
    """

    vae: Any
    text: Any
    tokenizer: Any
    loads: Counter[str] = field(default_factory=Counter)

    @classmethod
    def make(cls, folder: Path, options: argparse.Namespace) -> Models:
        """Writes a folder for each encoder, and loads or builds it; built ones are never written, they have up to 13 GB."""
        hide_broken_torchvision()
        import diffusers.utils.logging
        import transformers.utils.logging
        from diffusers import AutoencoderKL
        from transformers import AutoTokenizer, T5EncoderModel

        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = PRECISIONS[_precision(options)]
        torch.manual_seed(0)
        if options.real_sizes:
            vae, text = build_vae(options, dtype), build_text(options, dtype)
            vae.save_config(folder / "vae")
            text.config.save_pretrained(folder / "text")
            write_tokenizer(folder / "text")
        else:
            if not folder.exists():
                shutil.copytree(DEMO, folder)
            vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(options.device)
            text = T5EncoderModel.from_pretrained(folder / "text", dtype=dtype).to(options.device)
        if dtype == torch.float16:
            keep_in_fp32(text)
        tokenizer = AutoTokenizer.from_pretrained(folder / "text", padding_side="right")
        return cls(vae.eval(), text.eval(), tokenizer)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is loaded from a folder meanwhile is what is held: the VAE a copy, lest it be moved from its device."""
        from diffusers import AutoencoderKL
        from transformers import T5EncoderModel

        whole: dict[str, Any] = {"missing_keys": [], "unexpected_keys": []}

        def vae(*_: Any, torch_dtype: torch.dtype, output_loading_info: bool = False) -> Any:
            self.loads["vae"] += 1
            made = copy.deepcopy(self.vae).to(torch_dtype)
            return (made, whole) if output_loading_info else made

        def text(*_: Any, dtype: torch.dtype, output_loading_info: bool = False) -> Any:
            assert dtype == next(self.text.parameters()).dtype, "the text encoder is asked for in another precision"
            self.loads["text"] += 1
            return (self.text, whole) if output_loading_info else self.text

        with replaced(AutoencoderKL, "from_pretrained", vae), replaced(T5EncoderModel, "from_pretrained", text):
            yield


def build_vae(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A VAE of sd-vae-ft-ema's sizes."""
    from diffusers import AutoencoderKL

    width = options.vae_width
    with torch.device(options.device):
        return AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, sample_size=256, layers_per_block=2, norm_num_groups=32,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).to(dtype)  # fmt: skip


def build_text(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """An encoder of T5-v1.1-XXL's sizes, in its precision from the first: in fp32 it would have 19 GB."""
    from transformers import T5Config, T5EncoderModel

    width = options.t5_width
    config = T5Config(
        vocab_size=32128, d_model=width, d_ff=width * 5 // 2, d_kv=64, num_heads=width // 64, num_layers=options.t5_layers,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(options.device):
            return T5EncoderModel(config)
    finally:
        torch.set_default_dtype(before)


def write_tokenizer(folder: Path) -> None:
    """A unigram tokenizer over our words; it cuts longer ones in two, so that a caption has some more tokens than words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    whole = [f"▁{word}" for word in WORDS if len(word) < 7]
    halves = [half for word in WORDS for half in (f"▁{word[: len(word) // 2]}", word[len(word) // 2 :])]
    letters = ["▁", ",", ".", *map(chr, range(97, 123))]
    pieces = list(dict.fromkeys(["<pad>", "</s>", "<unk>", *whole, *halves, *letters]))
    scores = [0.0 if piece[0] == "<" else -5.0 if len(piece) > 1 else -9.0 for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), 2, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    ).save_pretrained(folder)


# ---- time by phase ----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by phase of the thread that made it. A phase within another does not count for that one too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.reading_cpu = 0.0
        self._thread, self._lock = threading.get_ident(), threading.Lock()
        self._phase, self._since = "other", time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        before = self._turn(phase)
        try:
            yield
        finally:
            self._turn(before)

    def _turn(self, phase: str) -> str:
        now, before = time.perf_counter(), self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    @contextmanager
    def reading(self) -> Iterator[None]:
        """CPU-seconds of whatever thread reads."""
        began = time.thread_time()
        yield
        with self._lock:
            self.reading_cpu += time.thread_time() - began

    def stop(self) -> Pass:
        self._turn("other")
        return Pass(self.seconds, self.reading_cpu, sum(self.seconds.values()))


@dataclass
class Pass:
    """Seconds of one pass, by phase, and CPU-seconds of reading in all threads."""

    phases: dict[str, float]
    reading_cpu: float
    seconds: float

    def of(self, phases: tuple[str, ...]) -> float:
        return sum(self.phases[phase] for phase in phases)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    inherited, before = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Our own functions, each in its phase."""

    def inside(owner: Any, name: str, phase: str | Callable[..., str]) -> None:
        function = getattr(owner, name)

        def called(*arguments: Any, **keywords: Any) -> Any:
            with clock(phase if isinstance(phase, str) else phase(*arguments)):
                return function(*arguments, **keywords)

        stack.enter_context(replaced(owner, name, called))

    load = PictureReader._load

    def reading(*arguments: Any) -> Any:
        with clock.reading():
            return load(*arguments)

    with ExitStack() as stack:
        inside(pipeline, "scan", "scan")
        inside(pipeline, "make_plan", "plan")
        inside(PictureReader, "_result", "read")
        inside(KLEncoder, "encode", "vae")
        inside(clean, "clean_caption", "clean")
        inside(T5Encoder, "encode", "text")
        inside(T5Encoder, "num_tokens", "text")
        inside(SetWriter, "write_part", "write_markers")
        inside(SetWriter, "_write", lambda writer, scratch, folder, *_: f"write_{folder.split('-')[0]}")
        inside(finish, "finish", "finish")
        inside(finish, "write_summary", "page")
        stack.enter_context(replaced(PictureReader, "_load", reading))
        yield


def ours(folder: Path, output: Path, models: Models, options: argparse.Namespace) -> Pass:
    config = recipe(folder, output, options)
    clock = Clock()
    with models.held(), timed(clock), redirect_stderr(io.StringIO()):  # of its progress
        pipeline.prepare(config, device=options.device)
    return clock.stop()


# ---- the released code's way --------------------------------------------------------------------------------------------


class Peer:
    """A list of pictures; then for each caption one call and one .npz, and for each picture and size one call and one .npy.

    Args:
        threaded: Captions in threads that share the encoder, pictures read ahead in threads.
    """

    def __init__(self, folder: Path, output: Path, models: Models, options: argparse.Namespace, threaded: bool) -> None:
        from diffusers import PixArtAlphaPipeline

        self.folder, self.output, self.models, self.options = folder / "pictures", output, models, options
        self.threaded, self.device, self.dtype = threaded, options.device, models.vae.dtype
        config = recipe(folder, output, options)
        square, buckets = config.latents
        self.square, self.buckets = square.square or 0, tuple(buckets.sizes or ())
        self.cleaner = object.__new__(PixArtAlphaPipeline)  # cleaning needs none of its nets
        self.encoder = threading.Lock()
        self.clock = Clock()

    def run(self) -> Pass:
        for name in ("text", "square", "buckets"):
            (self.output / name).mkdir(parents=True, exist_ok=True)
        with self.clock("scan"):
            items = self.listed()
        self.each(self.caption, items, CAPTION_THREADS)
        self.pictures(items, "square", self.as_square, 1)  # there the released code reads nothing ahead
        self.pictures(items, "buckets", self.as_bucket, READERS)
        return self.clock.stop()

    def listed(self) -> list[dict[str, Any]]:
        from PIL import Image

        items = []
        for path in sorted(self.folder.glob("*.jpg")):
            with Image.open(path) as image:
                width, height = image.size
            about = {"path": path.name, "width": width, "height": height, "ratio": height / width}
            items.append({**about, "prompt": path.with_suffix(".txt").read_text()})
        (self.output / "list.json").write_text(json.dumps(items))
        return items

    def each(self, work: Callable[[Any], None], items: list[dict[str, Any]], threads: int) -> None:
        if self.threaded and threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, items))
        else:
            for item in items:
                work(item)

    @torch.no_grad()
    def caption(self, item: dict[str, Any]) -> None:
        path = self.output / "text" / Path(item["path"]).stem
        if path.with_suffix(".npz").exists():
            return
        with self.encoder:
            with self.clock("clean"):
                texts = self.cleaner._text_preprocessing(item["prompt"], clean_caption=True)
            with self.clock("text"):
                tokens = self.models.tokenizer(
                    texts, max_length=MAX_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
                )
                mask = tokens.attention_mask.to(self.device)
                features = self.models.text(tokens.input_ids.to(self.device), attention_mask=mask).last_hidden_state
        with self.clock("text"):
            arrays = {"caption_feature": features.float().cpu().numpy(), "attention_mask": mask.cpu().numpy()}
        with self.clock("write_captions"):
            np.savez_compressed(path, **arrays)

    def pictures(self, items: list[dict[str, Any]], name: str, cut: Callable[[Any], Any], readers: int) -> None:
        todo = [item for item in items if not self.path(name, item).exists()]
        with ExitStack() as stack:
            images: Iterator[torch.Tensor] = map(cut, todo)
            if self.threaded and readers > 1:
                images = stack.enter_context(ThreadPoolExecutor(readers)).map(cut, todo)
            for item in todo:
                with self.clock("read"):
                    image = next(images)
                self.latents(image, self.path(name, item))

    def path(self, name: str, item: dict[str, Any]) -> Path:
        return self.output / name / (Path(item["path"]).stem + ".npy")

    @torch.no_grad()
    def latents(self, image: torch.Tensor, path: Path) -> None:
        with self.clock("vae"):
            posterior = self.models.vae.encode(image.to(self.device)[None].to(self.dtype)).latent_dist
            moments = torch.cat([posterior.mean, posterior.std], 1).float().cpu().numpy().squeeze()
        with self.clock("write_latents"):
            np.save(path, moments)

    def as_square(self, item: dict[str, Any]) -> torch.Tensor:
        """Resized bilinearly on the shorter side, then cut in the centre."""
        from PIL import Image

        with self.clock.reading():
            image = self.opened(item)
            scale, side = self.square / min(image.size), self.square
            size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            return self.tensor(np.asarray(image.crop((left, top, left + side, top + side))))

    def as_bucket(self, item: dict[str, Any]) -> torch.Tensor:
        """Resized bicubically to the bucket's size, whatever its own ratio."""
        from PIL import Image

        with self.clock.reading():
            bucket = int(nearest_of(RATIOS, np.array([item["height"]]), np.array([item["width"]]))[0])
            height, width = self.buckets[bucket]
            return self.tensor(np.asarray(self.opened(item).resize((width, height), Image.Resampling.BICUBIC)))

    def opened(self, item: dict[str, Any]) -> Any:
        from PIL import Image

        with Image.open(self.folder / item["path"]) as file:
            return file.convert("RGB")

    def tensor(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """(3, H, W) in -1 … 1."""
        return (torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255 - 0.5) / 0.5


# ---- what is measured -------------------------------------------------------------------------------------------------


def measure(folder: Path, models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating rounds; the first one warms up and is compared, feature by feature."""
    passes: dict[str, list[Pass]] = {"ours": [], "one thread": [], "threads": []}
    made: dict[str, Any] = {}
    again: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(options.rounds + 1):
        names = list(passes) if number % 2 else list(reversed(passes))
        for name in names:
            output = folder / name.replace(" ", "-")
            models.loads.clear()
            found = _pass(name, folder, output, models, options)
            if name == "ours":
                made["loads"] = dict(models.loads)
            if number:
                passes[name].append(found)
        for kind, name in (("ours", "ours"), ("peer", "one thread")):
            began = time.perf_counter()
            _pass(name, folder, folder / name.replace(" ", "-"), models, options)
            again[kind].append(time.perf_counter() - began)
        if not number:
            made |= compared(folder / "ours", folder / "one-thread/text")
            made["stored"] = stored(folder / "ours", folder / "one-thread")
        for name in passes:
            shutil.rmtree(folder / name.replace(" ", "-"))
    return {**_about(options, models), **made, **_figures(passes, options.pictures), **_nothing_to_do(again)}


def _pass(name: str, folder: Path, output: Path, models: Models, options: argparse.Namespace) -> Pass:
    if name == "ours":
        return ours(folder, output, models, options)
    return Peer(folder, output, models, options, name == "threads").run()


def _about(options: argparse.Namespace, models: Models) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    where = f"{cores} cores" if options.device == "cpu" else torch.cuda.get_device_name()
    return {
        "samples": options.pictures,
        "pixels": options.pixels,
        "rounds": options.rounds,
        "device": f"{where}, load {os.getloadavg()[0]:.1f}" if options.device == "cpu" else where,
        "precision": _precision(options),
        "codec": options.codec,
        "text_parameters": sum(each.numel() for each in models.text.parameters()),
        "vae_parameters": sum(each.numel() for each in models.vae.encoder.parameters()),
    }


def _figures(passes: dict[str, list[Pass]], samples: int) -> dict[str, Any]:
    """Rates, and ratios by round to the better of the peer's ways, whose medians are told."""
    own = passes["ours"]
    better = min(("one thread", "threads"), key=lambda name: statistics.median(each.seconds for each in passes[name]))
    phases = {
        phase: {
            "ours_s": statistics.median(each.phases[phase] for each in own),
            "peer_s": statistics.median(each.phases[phase] for each in passes["one thread"]),
            "ratio": _ratio(passes["one thread"], own, lambda each: each.phases[phase]),  # noqa: B023 - called here
        }
        for phase in PHASES
    }
    # threads overlap, so what captions and pictures take in them is not told apart: the whole is
    wholes = {name: statistics.median(each.seconds for each in values) for name, values in passes.items()}
    ratios = [peer.seconds / each.seconds for each, peer in zip(own, passes[better], strict=True)]
    fixed = [
        peer.seconds / (each.seconds - each.phases["page"]) for each, peer in zip(own, passes[better], strict=True)
    ]
    return {
        "pictures_per_s": samples / statistics.median(each.of(OF_PICTURES) for each in own),
        "captions_per_s": samples / statistics.median(each.of(OF_CAPTIONS) for each in own),
        "samples_per_s": samples / wholes["ours"],
        "peer_pictures_per_s": samples / statistics.median(each.of(OF_PICTURES) for each in passes["one thread"]),
        "peer_captions_per_s": samples / statistics.median(each.of(OF_CAPTIONS) for each in passes["one thread"]),
        "peer_samples_per_s": {name: samples / wholes[name] for name in ("one thread", "threads")},
        "ratio_pictures": _ratio(passes["one thread"], own, lambda each: each.of(OF_PICTURES)),
        "ratio_captions": _ratio(passes["one thread"], own, lambda each: each.of(OF_CAPTIONS)),
        "better_peer": better,
        "ratio_whole": statistics.median(ratios),
        "ratio_whole_spread": [min(ratios), max(ratios)],
        "ratio_without_page": statistics.median(fixed),
        "reading_cpu_ms": {
            name: 1e3 * statistics.median(each.reading_cpu for each in passes[name]) / samples
            for name in ("ours", "one thread")
        },
        "phases": phases,
        "passes": {name: [vars(each) for each in values] for name, values in passes.items()},
    }


def _ratio(peers: list[Pass], own: list[Pass], seconds: Callable[[Pass], float]) -> float | None:
    """None where one of them has no such phase."""
    pairs = [(seconds(peer), seconds(each)) for peer, each in zip(peers, own, strict=True)]
    if not all(one > 0 and two > 0 for one, two in pairs):
        return None
    return statistics.median(one / two for one, two in pairs)


def _nothing_to_do(again: dict[str, list[float]]) -> dict[str, float]:
    return {f"nothing_to_do_{name}_s": statistics.median(values) for name, values in again.items()}


def compared(made: Path, files: Path) -> dict[str, float]:
    """‖ours − peer's‖ / ‖peer's‖ over the features of all real tokens."""
    opened, squares, errors = PreparedSet.open(made), 0.0, 0.0
    about, index = opened.description, opened.index("captions")
    codec = CODECS[about.caption_codec]
    for group in range(len(opened.counts)):
        shard = FolderSource(index, made / "captions").open(group)
        for number in range(int(opened.counts[group])):
            row = shard.read(number)
            raw = torch.frombuffer(row["caption_embeds"], dtype=torch.uint8)
            raw = raw.reshape(-1, codec.bytes_per_token(about.caption_channels))
            features = codec.decode(raw, about.caption_channels).float().numpy()
            with np.load(files / (Path(bytes(row["name"]).decode()).stem + ".npz")) as arrays:
                wanted = arrays["caption_feature"][0, : int(arrays["attention_mask"].sum())]
            errors += float(np.square(features - wanted).sum())
            squares += float(np.square(wanted).sum())
    return {"features_error": (errors / squares) ** 0.5}


def stored(made: Path, peer: Path) -> dict[str, float]:
    """Bytes of a sample on the disk, and files."""
    opened = PreparedSet.open(made)
    sizes = {
        name: int(opened.index(name).sizes.sum()) / opened.num_samples for name in ("captions", "square", "buckets")
    }
    files = list(peer.rglob("*.np[yz]"))
    return {
        "ours_caption": sizes["captions"],
        "ours_latents": sizes["square"] + sizes["buckets"],
        "peer_caption": sum(path.stat().st_size for path in files if path.suffix == ".npz") / opened.num_samples,
        "peer_latents": sum(path.stat().st_size for path in files if path.suffix == ".npy") / opened.num_samples,
        "ours_files": sum(path.is_file() for path in made.rglob("*") if ".work" not in path.parts),
        "peer_files": len(files),
    }


def bytes_of_captions(models: Models, texts: list[str], found: dict[str, float]) -> dict[str, Any]:
    """Of these captions' tokens: at 4,096 channels, and at the encoder's own."""
    ids = models.tokenizer([clean.clean_caption(text) for text in texts], truncation=True, max_length=MAX_TOKENS)
    tokens = [len(each) for each in ids.input_ids]
    mean = statistics.mean(tokens)

    def at(channels: int) -> dict[str, float]:
        return {
            **{name: mean * codec.bytes_per_token(channels) for name, codec in CODECS.items() if channels % 64 == 0},
            "fp16_padded": 2 * MAX_TOKENS * channels,
            "fp32_padded": 4 * MAX_TOKENS * channels,
        }

    return {
        "bytes_per_caption_fp16": at(PAPER_CHANNELS)["fp16"],
        "bytes_per_caption_int8": at(PAPER_CHANNELS)["int8"],
        "bytes_per_caption": at(PAPER_CHANNELS),
        "channels": models.text.config.d_model,
        "bytes_per_caption_here": at(models.text.config.d_model),
        "tokens_mean": mean,
        "tokens": {str(least): count for least, count in sorted(Counter(each // 10 * 10 for each in tokens).items())},
        "stored": found,
    }


def by_batch(
    folder: Path, models: Models, texts: list[str], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Pictures and captions a second of our encoders alone; captions sorted by length, as in a part."""
    config = recipe(folder, folder / "-", options)
    side = config.latents[0].square or 0
    noise = np.random.default_rng(0).integers(0, 256, (max([1, *options.batches]), side, side, 3))
    images = noise.astype(np.uint8)
    precision, made = _precision(options), {}
    with models.held():
        vae = KLEncoder(config.vae, options.device, precision=precision)
        text = T5Encoder(config.text_encoder, MAX_TOKENS, options.device, precision=precision, clean=True)
    ordered = sorted(texts, key=lambda each: text.num_tokens([each]))  # they are cleaned now, and remembered
    for size in options.batches:
        made[str(size)] = {
            "square_pictures_per_s": _rate(lambda size=size: vae.encode(images[:size]), size),  # type: ignore[misc]
            "captions_per_s": _rate(
                lambda size=size: [text.encode(ordered[at : at + size]) for at in range(0, len(ordered), size)],  # type: ignore[misc]
                len(ordered),
            ),
        }
    return made


def _rate(work: Callable[[], object], count: int) -> float:
    """The best of three; the first is no worse a guess than that of a machine which others use too."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return count / min(seconds)


# ---- memory -----------------------------------------------------------------------------------------------------------


def one_pass(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: makes the encoders, then one pass. Peaks in MB: of memory before and after, and of the device."""
    folder = Path(options.folder)
    models = Models.make(folder / "encoders", options)
    before = _resident()
    _pass("ours" if options.one == "ours" else "one thread", folder, folder / options.one, models, options)
    peaks = {f"{options.one} with encoders only": before, options.one: _resident()}
    if options.device == "cuda":
        peaks[f"{options.one} on the device"] = torch.cuda.max_memory_allocated() / 1e6
    return peaks


def _resident() -> float:
    """Not `ru_maxrss`, which a new process has from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


def memory(folder: Path) -> dict[str, float]:
    """Peaks of each way in a process of its own, in MB."""
    given = [word for word in sys.argv[1:] if word != "--json"]
    made: dict[str, float] = {}
    for who in ("ours", "peer"):
        command = [sys.executable, __file__, *given, "--folder", str(folder), "--one", who]
        made |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return made


# ---- in words -----------------------------------------------------------------------------------------------------------


def _words(answer: dict[str, Any]) -> str:
    return "\n".join([*_phase_lines(answer), *_whole_lines(answer), *_byte_lines(answer)])


def _phase_lines(answer: dict[str, Any]) -> list[str]:
    samples = answer["samples"]
    vae, text = (f"{answer[f'{name}_parameters'] / 1e6:,.1f} M" for name in ("vae", "text"))
    lines = [
        f"{samples} pictures of {answer['pixels']}² pixels, captions of {answer['tokens_mean']:.0f} tokens; {answer['device']}; "
        f"{answer['precision']}, encoders of {vae} and {text}; medians of {answer['rounds']} alternating rounds",
        f"  {'ms a sample':<28}{'ours':>9}{'peer':>9}{'ratio':>8}",
    ]
    for phase, row in answer["phases"].items():
        ratio = "" if row["ratio"] is None or phase == "other" else f"{row['ratio']:.1f}"
        own, peer = (f"{1e3 * row[key] / samples:.2f}" if row[key] else "-" for key in ("ours_s", "peer_s"))
        lines.append(f"  {PHASES[phase]:<28}{own:>9}{peer:>9}{ratio:>8}")
    reading = answer["reading_cpu_ms"]
    lines.append(
        f"  reading took {reading['ours']:.1f} ms of CPU in our threads, {reading['one thread']:.1f} in the peer's one"
    )
    return lines


def _whole_lines(answer: dict[str, Any]) -> list[str]:
    peers, loads = answer["peer_samples_per_s"], answer["loads"]
    lines = [
        f"  {what}/s: {answer[f'{what}_per_s']:.1f}, peer {answer[f'peer_{what}_per_s']:.1f} in one thread; "
        f"{answer[f'ratio_{what}']:.1f} times"
        for what in ("pictures", "captions")
    ]
    low, high = answer["ratio_whole_spread"]
    return [
        *lines,
        f"  samples/s: {answer['samples_per_s']:.1f}, peer {peers['one thread']:.1f} in one thread, {peers['threads']:.1f} in "
        f"threads; {answer['ratio_whole']:.1f} times the better ({low:.1f} to {high:.1f})",
        f"  {answer['ratio_without_page']:.1f} times without the page, which costs the same for a set of any size",
        f"  features differ by {answer['features_error']:.1e} of their size; our encoders' loading is in no time: prepare does it "
        f"{loads['vae']} times for the VAE and {loads['text']} times for T5",
        f"  nothing left to do: told after {answer['nothing_to_do_ours_s']:.2f} s, peer {answer['nothing_to_do_peer_s']:.2f} s",
        "  peak of memory: " + ", ".join(f"{name} {size:,.0f} MB" for name, size in answer["memory_mb"].items()),
        *(
            f"  encoders alone, {size} at once: {row['square_pictures_per_s']:,.1f} square pictures/s, "
            f"{row['captions_per_s']:,.1f} captions/s"
            for size, row in answer["by_batch"].items()
        ),
    ]


def _byte_lines(answer: dict[str, Any]) -> list[str]:
    held, found = answer["bytes_per_caption"], answer["stored"]
    return [
        f"  a caption of 4,096 channels: {held['fp16']:,.0f} bytes in fp16, {held['int8']:,.0f} in int8; padded to {MAX_TOKENS} "
        f"tokens {held['fp16_padded']:,} in fp16, {held['fp32_padded']:,} in fp32",
        f"  on the disk, {answer['channels']} channels, {answer['codec']}: caption {found['ours_caption']:,.0f} bytes, peer "
        f"{found['peer_caption']:,.0f} (compressed); latents {found['ours_latents']:,.0f}, peer {found['peer_latents']:,.0f}; "
        f"{found['ours_files']} files, peer {found['peer_files']}",
    ]


if __name__ == "__main__":
    main()
