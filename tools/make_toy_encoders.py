"""Makes the demo's encoders: a small AutoencoderKL and a small T5 encoder with its tokenizer, trained on the drawn world.

    python tools/make_toy_encoders.py --out pixart_ds/demo/encoders

One thread, about five minutes of CPU time. Both are ordinary folders of diffusers and transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from pixart_ds.demo.judge import score
from pixart_ds.demo.pictures import COLOURS, PLACES, SHAPES, SIZES, WORDS, Scene, Thing, caption, draw, scenes

PICTURE_SIZES = ((32, 32), (32, 32), (40, 40), (48, 48), (40, 56), (32, 48), (48, 32), (24, 48), (64, 32))
"""(height, width) of training batches; the square of 32 pixels twice."""

SPECIAL = ("<pad>", "</s>", "<unk>")
VOCABULARY = 32
NEIGHBOURS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for vae/ and text/")
    parser.add_argument("--vae-minutes", type=float, default=4.0, help="CPU minutes for the VAE")
    parser.add_argument("--text-seconds", type=float, default=25.0, help="CPU seconds for the text encoder")
    parser.add_argument("--only", choices=("vae", "text"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "vae":
        torch.manual_seed(0)
        make_text_encoder(options.out / "text", options.text_seconds)
    if options.only != "text":
        torch.manual_seed(0)
        make_vae(options.out / "vae", options.vae_minutes)


# ---- the VAE ------------------------------------------------------------------------------------------------------------


def make_vae(folder: Path, minutes: float) -> None:
    """Trains, measures and saves the VAE, in fp16, with its scaling factor."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=32, block_out_channels=(16, 16, 32), layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if "conv2.weight" in name:  # residual branches start at zero: many times faster in the first minute
            nn.init.zeros_(parameter)
    print(f"VAE: {sum(p.numel() for p in vae.parameters()):,} parameters")
    train_vae(vae, minutes)
    vae = vae.half().float().eval()  # what is measured is what is stored
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae), 4))
    print(f"scaling factor {vae.config.scaling_factor}")
    for size in sorted(set(PICTURE_SIZES)):
        print(size, json.dumps(measure_vae(vae, *size)))
    vae.half().save_pretrained(folder)


def train_vae(vae: AutoencoderKL, minutes: float) -> None:
    """L1 + MSE + 1e-4 KL on pictures with a thing in almost every quarter: the codec is local, so that is more to learn from."""
    random = np.random.default_rng(1)
    batches = {
        size: pictures([busy(scene, random) for scene in scenes(1500, 1)], random, *size) for size in set(PICTURE_SIZES)
    }
    adam = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True)

    def step(number: int) -> float:
        images = batches[PICTURE_SIZES[number % len(PICTURE_SIZES)]]
        target = images[torch.randint(len(images), (8,))]
        posterior = vae.encode(target).latent_dist
        made = vae.decode(posterior.sample()).sample
        loss = (
            F.l1_loss(made, target)
            + F.mse_loss(made, target)
            + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel() * 4
        )
        return update(vae, adam, loss)

    run(step, minutes * 60, adam, 2e-3, "VAE")


def busy(scene: Scene, random: np.random.Generator) -> Scene:
    """The scene's ground with things in nine of ten quarters."""

    def pick(names: object) -> str:
        options = list(names)  # type: ignore[call-overload]
        return str(options[random.integers(len(options))])

    things = tuple(Thing(pick(SIZES), pick(COLOURS), pick(SHAPES), place) for place in PLACES if random.random() < 0.9)
    return dataclasses.replace(scene, things=things)


def pictures(shown: list[Scene], random: np.random.Generator, height: int, width: int) -> torch.Tensor:
    """(n, 3, height, width) in -1 … 1."""
    drawn = np.stack([draw(scene, random, height, width) for scene in shown])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def latent_std(vae: AutoencoderKL) -> float:
    """Standard deviation of all latents of training pictures."""
    images = pictures(scenes(400, 3), np.random.default_rng(3), 32, 32)
    return float(vae.encode(images).latent_dist.sample().std())


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, height: int, width: int) -> dict[str, float]:
    """The judge's scores of reconstructions, and their PSNR in dB."""
    shown = scenes(150, 99)
    images = pictures(shown, np.random.default_rng(99), height, width)
    made = vae.decode(vae.encode(images).latent_dist.mode()).sample
    rows = ((made + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    psnr = float((-10 * ((made - images).square().mean((1, 2, 3)) / 4).log10()).mean())
    return {name: round(value, 3) for name, value in {**score(list(rows), shown), "psnr": psnr}.items()}


# ---- the text encoder ---------------------------------------------------------------------------------------------------


def make_text_encoder(folder: Path, seconds: float) -> None:
    """Trains and saves the T5 encoder, in fp16, with its word tokenizer."""
    tokenizer = make_tokenizer()
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.0,
            relative_attention_num_buckets=32, relative_attention_max_distance=64, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():  # positions matter from the start
        encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(30)
    print(
        f"text encoder: {sum(p.numel() for p in encoder.parameters()):,} parameters, {len(SPECIAL) + len(WORDS)} words"
    )
    train_text_encoder(encoder, tokenizer, seconds)
    encoder.eval().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # transformers 5 writes a class that 4 does not know; both know this one
    about = {**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(about, indent=2) + "\n")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the world's captions, </s> at the end."""
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )


def train_text_encoder(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, seconds: float) -> None:
    """Each output must name the words around it by linear heads, so that a token's features tell what it belongs to."""
    tokens = tokenizer([caption(scene) for scene in scenes(4000, 11)], padding=True, return_tensors="pt")
    around = 2 * NEIGHBOURS + 1
    heads = nn.Linear(encoder.config.d_model, around * VOCABULARY)
    padded = F.pad(tokens.input_ids, (NEIGHBOURS, NEIGHBOURS))
    length = tokens.input_ids.shape[1]
    targets = torch.stack([padded[:, place : place + length] for place in range(around)], -1)  # (n, length, around)
    both = nn.ModuleList([encoder, heads])
    adam = torch.optim.AdamW(both.parameters(), lr=3e-3, weight_decay=0.01, fused=True)

    def step(number: int) -> float:
        rows = torch.randint(len(targets), (64,))
        mask = tokens.attention_mask[rows]
        guesses = heads(encoder(tokens.input_ids[rows], attention_mask=mask).last_hidden_state)
        real = mask.bool()
        loss = F.cross_entropy(guesses[real].view(-1, VOCABULARY), targets[rows][real].view(-1))
        return update(both, adam, loss)

    run(step, seconds, adam, 3e-3, "text encoder")


# ---- both ---------------------------------------------------------------------------------------------------------------


def update(module: nn.Module, adam: torch.optim.AdamW, loss: torch.Tensor) -> float:
    """One clipped step; returns the loss."""
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    adam.step()
    return loss.item()


def run(step: Callable[[int], float], seconds: float, adam: torch.optim.AdamW, rate: float, name: str) -> None:
    """Steps for so many CPU seconds: a short warm-up, then a cosine to zero."""
    began, number, next_line = time.process_time(), 0, 30.0
    while (spent := time.process_time() - began) < seconds:
        for group in adam.param_groups:
            group["lr"] = rate * min(1, (number + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * spent / seconds))
        loss = step(number)
        number += 1
        if spent > next_line:
            next_line += 30
            print(f"{name}: {spent:.0f} s, step {number}, loss {loss:.4f}", flush=True)
    print(f"{name}: {number} steps, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
