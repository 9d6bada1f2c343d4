"""Pictures to captions: by a LLaVA of transformers, as in the paper (§2.4), or by a class of your own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.config.schema import CaptionsConfig
from pixart_ds.encoders.fingerprint import PRECISIONS, encoder_folder, fingerprint
from pixart_ds.encoders.loading import load_whole
from pixart_ds.errors import ConfigError, DataError, MachineError

ORIGINAL_FORM = 'Given the caption of this image "{original}", {prompt}'
"""How the model is told the source's caption (released captioning script); `prompt` begins in lower case."""
ORIGINAL_CHARACTERS = 2000
"""More of a source's caption is not told: with picture and answer it must fit into LLaVA's 4096 tokens."""
WITHOUT_TEMPLATE = "USER: {image}\n{request} ASSISTANT:"
"""LLaVA v1.5's form, for a model whose folder has no chat template."""

LONG_EDGE, SHORT_EDGE = 800, 400
"""Pictures are shrunk to fit into both before the model's own resizing, as in the released script."""
_LEAST_EDGE = 4
"""Image processors take an edge of 1 or 3 pixels for the channels."""


class Captioner(Protocol):
    """What `prepare` needs of whatever writes captions."""

    identity: str
    """What makes the captions: the model and all settings that change a word. It is stored with them."""

    def caption(
        self, pictures: Sequence[npt.NDArray[np.uint8]], originals: Sequence[str | None], seed: int
    ) -> list[str]:
        """One caption for each picture; "" for one of which there is nothing to say.

        What it returns must depend on nothing but its arguments: an interrupted part is done again and must come out the same.

        Args:
            pictures: Each (H, W, 3), RGB, of any size.
            originals: The source's captions, or None.
            seed: Of whatever is drawn.
        """
        ...


class LlavaCaptioner:
    """A LLaVA, or another model that transformers loads as image-text-to-text, with its processor.

    Args:
        config: Its `model` is a folder or a hub name.
        device: Where it computes.

    Raises:
        ConfigError: There is no such model, or its chat template does not place one picture.
    """

    def __init__(self, config: CaptionsConfig, device: str = "cpu") -> None:
        hide_broken_torchvision()
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if config.model is None:
            raise ConfigError(
                "no model is named that could write captions", where="captions.model", remedy="name a LLaVA"
            )
        folder = encoder_folder(config.model, "captioning model's")
        self._config = config
        self._device = torch.device(device)
        self._dtype = PRECISIONS[config.precision]
        try:
            self._processor = AutoProcessor.from_pretrained(folder)
            model = load_whole(AutoModelForImageTextToText.from_pretrained, folder, dtype=self._dtype)
        except (OSError, ValueError, KeyError) as cause:
            raise _no_llava(
                config.model, str(cause).split("\n", 1)[0]
            ) from cause  # more lines name every model there is
        self._model = model.to(device).eval()
        self._tokenizer: Any = getattr(self._processor, "tokenizer", None)
        if self._tokenizer is None or getattr(self._processor, "image_processor", None) is None:
            raise _no_llava(config.model, "its processor does not take pictures with text")
        self._tokenizer.padding_side = "left"  # answers begin where prompts end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._image_token: str = getattr(self._processor, "image_token", "<image>")
        prompt = self._prompt(None)
        if (places := prompt.count(self._image_token)) != 1:
            raise ConfigError(
                f"the model's prompt has {places} places for the picture and not one: {prompt!r}",
                where="captions.prompt, and the chat template of captions.model",
                remedy=f"leave {self._image_token} out of captions.prompt, or mend the model's chat template",
            )
        settings = {
            "prompt": prompt,
            "with_original": ORIGINAL_FORM if config.with_original else None,
            "precision": config.precision,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }
        made_by = fingerprint(config.model, getattr(self._model.config, "_commit_hash", None))
        self.identity: str = f"llava {made_by} {json.dumps(settings, ensure_ascii=False)}"

    def caption(
        self, pictures: Sequence[npt.NDArray[np.uint8]], originals: Sequence[str | None], seed: int
    ) -> list[str]:
        """See `Captioner`. Each picture has its own random numbers, so but for rounding it does not matter which share a batch.

        Raises:
            MachineError: The GPU's memory does not suffice for a batch.
        """
        prompts = [self._prompt(original) for _, original in zip(pictures, originals, strict=True)]
        made: list[str] = []
        for start in range(0, len(prompts), self._config.batch_size):
            batch = slice(start, start + self._config.batch_size)
            numbers = range(start, start + len(prompts[batch]))
            try:
                made += self._answers(pictures[batch], prompts[batch], [_mixed(seed + number) for number in numbers])
            except torch.OutOfMemoryError as cause:
                raise MachineError(
                    f"the memory of {self._device} does not suffice to describe {len(numbers)} pictures at once",
                    where="captions.batch_size",
                    remedy="lower it, or captions.max_new_tokens",
                ) from cause
        return made

    @torch.no_grad()
    def _answers(
        self, pictures: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[str]:
        starts_itself = self._tokenizer.bos_token is not None and prompts[0].startswith(self._tokenizer.bos_token)
        batch = self._processor(
            images=[shrunk(picture) for picture in pictures],
            text=list(prompts),
            padding=True,
            add_special_tokens=not starts_itself,
            return_tensors="pt",
        ).to(self._device, self._dtype)
        temperature = self._config.temperature
        drawn = [_Draw(temperature, seeds, self._device)] if temperature > 0 else []
        tokens = self._model.generate(
            **batch,
            max_new_tokens=self._config.max_new_tokens,
            logits_processor=drawn,
            pad_token_id=self._tokenizer.pad_token_id,
            num_beams=1,
            do_sample=False,  # `drawn` does it; the model's own settings for sampling must not
            temperature=None,
            top_p=None,
            top_k=None,
        )  # (B, prompt + answer)
        answers = tokens[:, batch["input_ids"].shape[1] :]
        return [answer.strip() for answer in self._tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _prompt(self, original: str | None) -> str:
        request = self._config.prompt
        told = self._plain(original)[:ORIGINAL_CHARACTERS].strip() if self._config.with_original and original else ""
        if told:
            request = ORIGINAL_FORM.format(original=told, prompt=request[:1].lower() + request[1:])
        if getattr(self._processor, "chat_template", None) is None:
            return WITHOUT_TEMPLATE.format(image=self._image_token, request=request)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request}]}
        return str(self._processor.apply_chat_template([message], add_generation_prompt=True))

    def _plain(self, original: str) -> str:
        """Without what the tokenizer would take for a sign of its own, such as the place of a picture."""
        for token in sorted({*self._tokenizer.all_special_tokens, self._image_token}):
            original = original.replace(token, " ")
        return original


class _Draw:
    """Draws each next token with the probabilities softmax(logits / temperature), each picture with random numbers of its own.

    The largest of logits / temperature + Gumbel noise is distributed so (Gumbel-max); the noise is -log of exponential numbers.
    transformers' own sampling draws for a whole batch at once, and a picture's caption would depend on its neighbours.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, vocabulary) to scores whose largest is the one drawn."""
        # In 64 bits: 32 have so few small numbers that one in 500 tokens would be noise alone.
        noise = torch.empty_like(scores, dtype=torch.float64)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.double() / self._temperature - noise.log()


def shrunk_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of a picture at its aspect ratio, no larger than `LONG_EDGE` and `SHORT_EDGE`."""
    scale = min(1.0, LONG_EDGE / max(height, width), SHORT_EDGE / min(height, width))
    return max(round(height * scale), _LEAST_EDGE), max(round(width * scale), _LEAST_EDGE)


def shrunk(picture: npt.NDArray[np.uint8]) -> Image.Image:
    """The picture (H, W, 3) at `shrunk_size`."""
    size = shrunk_size(*picture.shape[:2])[::-1]
    image = Image.fromarray(picture)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _mixed(seed: int) -> int:
    """64 bits that have nothing in common with those of the next seed."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def _no_llava(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"no model that describes pictures can be loaded from {name}: {why}",
        where="captions.model",
        remedy="give a folder or a hub name with a LLaVA and its processor, such as llava-hf/llava-1.5-7b-hf",
    )


# ---- by name ------------------------------------------------------------------------------------------------------------

_BUILT_IN: dict[str, Callable[[CaptionsConfig, str], Captioner]] = {"llava": LlavaCaptioner}


def load_captioner(config: CaptionsConfig, device: str) -> Captioner | None:
    """What `captions.captioner` names; None if captions are the source's.

    Raises:
        ConfigError: It names nothing that can be imported, or not a captioner.
    """
    if config.captioner == "source":
        return None
    if config.captioner in _BUILT_IN:
        return _BUILT_IN[config.captioner](config, device)
    return _OwnCaptioner(config, device)


class _OwnCaptioner:
    """The user's own, with what it gives looked at."""

    def __init__(self, config: CaptionsConfig, device: str) -> None:
        self._name = config.captioner
        make = _imported(config.captioner)
        try:
            inspect.signature(make).bind(config, device)
        except TypeError as cause:
            raise _wrong(f"{self._name} cannot be called with (config, device): {cause}", "let it take both") from cause
        self._own = make(config, device)
        if not callable(getattr(self._own, "caption", None)):
            raise _wrong(f"{self._name} has no method caption", "give it caption(pictures, originals, seed)")
        identity = getattr(self._own, "identity", None)
        if not isinstance(identity, str) or not identity:
            raise _wrong(
                f"{self._name} has no text `identity`, but {identity!r}",
                "set one that says what makes the captions; they are stored with it",
            )
        self.identity: str = identity

    def caption(
        self, pictures: Sequence[npt.NDArray[np.uint8]], originals: Sequence[str | None], seed: int
    ) -> list[str]:
        """See `Captioner`.

        Raises:
            DataError: Not one text for each picture came back.
        """
        made = list(self._own.caption(pictures, originals, seed))
        if len(made) != len(pictures):
            raise DataError(
                f"{self._name} gave {len(made)} captions for {len(pictures)} pictures", remedy="mend its method caption"
            )
        for text in made:
            if not isinstance(text, str):
                raise DataError(
                    f"{self._name} gave {text!r} where a caption should be", remedy='give a text, "" for none'
                )
        return made


def _imported(name: str) -> Callable[[CaptionsConfig, str], Any]:
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise _wrong(
            f"there is no captioner {name!r}",
            f"give one of {', '.join(['source', *_BUILT_IN])}, or your own class as package.module:Name",
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as cause:
        raise _wrong(
            f"{module_name} of {name!r} cannot be imported: {cause}", "put the folder that holds it on PYTHONPATH"
        ) from cause
    made = getattr(module, attribute, None)
    if not callable(made):
        raise _wrong(
            f"{module_name} ({module.__file__}) has no class {attribute}", "name one that takes (config, device)"
        )
    return cast(Callable[[CaptionsConfig, str], Any], made)


def _wrong(what: str, remedy: str) -> ConfigError:
    return ConfigError(what, where="captions.captioner", remedy=remedy)
