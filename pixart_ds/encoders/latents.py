"""Pictures to latents and back, by a diffusers AutoencoderKL in fp32."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.encoders.fingerprint import encoder_folder, fingerprint
from pixart_ds.errors import ConfigError, DataError

_FP16_MAX = 65504.0


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

    Raises:
        ConfigError: There is no such folder, or it holds no AutoencoderKL.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        hide_broken_torchvision()
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        logging.set_verbosity_error()
        folder = encoder_folder(name, "VAE")
        try:
            self._vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()
        except (OSError, ValueError) as cause:
            raise ConfigError(
                f"no AutoencoderKL can be loaded from {name}: {cause}", remedy="give a diffusers VAE folder"
            ) from cause
        self._device = device
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
            DataError: The encoder gave numbers that fp16 cannot hold.
        """
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        posterior = self._vae.encode(pixels).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], 1)  # (B, 2C, h, w)
        if not bool((moments.abs() < _FP16_MAX).all()):
            raise DataError(
                "the VAE gave latents that are not finite in fp16",
                remedy="look at the pictures, or use a VAE made for fp16",
            )
        return moments.cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """See `LatentEncoder`."""
        unscaled = latents.to(self._device).float() / self.scaling_factor + self.shift_factor
        pixels = self._vae.decode(unscaled).sample  # (B, 3, H, W)
        return ((pixels + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
