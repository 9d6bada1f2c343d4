"""Pictures to latents and back, by a diffusers AutoencoderKL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.encoders.fingerprint import FP16_MAX, PRECISIONS, Precision, encoder_folder, fingerprint
from pixart_ds.encoders.loading import load_whole
from pixart_ds.errors import ConfigError, DataError


def vae_facts(name: str) -> tuple[int, int]:
    """Downsampling factor and channels of a VAE, from its config file alone.

    Raises:
        ConfigError: There is no such VAE.
    """
    hide_broken_torchvision()
    from diffusers import AutoencoderKL

    try:
        config = AutoencoderKL.load_config(encoder_folder(name, "VAE"))
        return 2 ** (len(config["block_out_channels"]) - 1), int(config["latent_channels"])
    except (OSError, ValueError, KeyError) as cause:
        raise ConfigError(
            f"{name} is no AutoencoderKL: {cause}", where="vae", remedy="give a diffusers VAE folder"
        ) from cause


class LatentsOverflow(DataError):
    """The VAE gave numbers that fp16 cannot hold.

    Args:
        pictures: Of which pictures of the batch.
    """

    def __init__(self, what: str, pictures: Sequence[int], *, remedy: str) -> None:
        super().__init__(what, remedy=remedy)
        self.pictures = tuple(pictures)


class LatentEncoder(Protocol):
    """What `prepare` and sampling need of an image autoencoder."""

    channels: int
    downsampling_factor: int
    scaling_factor: float
    shift_factor: float
    fingerprint: str

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(B, H, W, 3) to (B, 2C, h, w): mean and standard deviation of the posterior, unscaled."""
        ...

    def decode(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Scaled latents (B, C, h, w) to (B, H, W, 3)."""
        ...


class KLEncoder:
    """A diffusers AutoencoderKL from a folder or the hub.

    Args:
        name: Folder or hub name.
        device: Where it computes.
        precision: In which it computes; mean and standard deviation are made of its output in fp32. Not every VAE can do fp16.

    Raises:
        ConfigError: There is no such folder, or it holds no AutoencoderKL.
    """

    def __init__(self, name: str, device: str = "cpu", *, precision: Precision = "fp32") -> None:
        hide_broken_torchvision()
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        logging.set_verbosity_error()
        folder = encoder_folder(name, "VAE")
        try:
            vae = load_whole(AutoencoderKL.from_pretrained, folder, torch_dtype=PRECISIONS[precision])
        except (OSError, ValueError) as cause:
            raise ConfigError(
                f"no AutoencoderKL can be loaded from {name}: {cause}", remedy="give a diffusers VAE folder"
            ) from cause
        self._vae = vae.to(device).eval()
        self._device = device
        self.precision = precision
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.downsampling_factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor: float = float(config.scaling_factor)
        self.shift_factor: float = float(config.shift_factor or 0.0)
        self.fingerprint: str = fingerprint(name)

    @torch.no_grad()
    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `LatentEncoder`.

        Raises:
            LatentsOverflow: The encoder gave numbers that fp16 cannot hold; which pictures of the batch.
        """
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        half = self._vae.encode(pixels.to(self._vae.dtype)).latent_dist
        posterior = type(half)(half.parameters.float())  # its exp is taken in fp32
        moments = torch.cat([posterior.mean, posterior.std], 1)  # (B, 2C, h, w)
        # the class bounds an infinite log-variance: it is looked for before that
        fits = (moments.abs() < FP16_MAX).flatten(1).all(1) & posterior.parameters.isfinite().flatten(1).all(1)  # (B,)
        if not bool(fits.all()):
            raise self._overflow((~fits).nonzero()[:, 0].tolist(), len(images))
        return moments.cpu().numpy()

    def _overflow(self, pictures: list[int], count: int) -> LatentsOverflow:
        what = f"the VAE gave latents that are not finite in fp16 for picture {pictures[0]} of a batch of {count}"
        if self.precision == "fp16":
            return LatentsOverflow(
                f"{what}; it computed in fp16", pictures, remedy="set vae_precision: fp32, or use a VAE made for fp16"
            )
        return LatentsOverflow(what, pictures, remedy="look at the picture and at the VAE's weights")

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """See `LatentEncoder`."""
        unscaled = latents.to(self._device).float() / self.scaling_factor + self.shift_factor
        pixels = self._vae.decode(unscaled.to(self._vae.dtype)).sample.float()  # (B, 3, H, W)
        return ((pixels + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
