"""A sample's draws: golden, and dependent on nothing but seed, stage, sample and visit."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixart_ds.diffusion.noise import Draws, draw, draw_all, normals
from pixart_ds.plan.random import key_of, raw_words

SHAPE = (4, 3, 5)


def normals_of(words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float32]:
    made = torch.full((len(words), count), torch.nan)
    normals(words, made)
    return made.numpy()


def test_golden_draws() -> None:
    # Written down once: a resumed run must draw these for ever.
    made = draw(43, "stage2", 7, 2, SHAPE, 0.1)
    assert (made.timestep, made.dropped, made.noise_key) == GOLDEN_SCALARS
    assert made.noise.reshape(-1)[:4].tolist() == pytest.approx(GOLDEN_NOISE, rel=1e-6)
    assert made.latent_noise.reshape(-1)[-4:].tolist() == pytest.approx(GOLDEN_LATENT_NOISE, rel=1e-6)


GOLDEN_SCALARS = (201, False, 8043703970126883575)
GOLDEN_NOISE = [-0.1949218064546585, -1.273578405380249, 0.36268267035484314, 1.1636565923690796]
GOLDEN_LATENT_NOISE = [0.9061713218688965, 0.9955131411552429, 0.5996637940406799, -0.06884326040744781]


def same(one: Draws, two: Draws) -> bool:
    return (
        one.timestep == two.timestep
        and one.dropped == two.dropped
        and bool((one.noise == two.noise).all())
        and bool((one.latent_noise == two.latent_noise).all())
    )


def test_every_part_of_the_key_matters() -> None:
    base = (43, "stage2", 7, 2)
    made = draw(*base, SHAPE, 0.1)
    assert same(made, draw(*base, SHAPE, 0.1))
    for other in ((44, "stage2", 7, 2), (43, "stage3", 7, 2), (43, "stage2", 8, 2), (43, "stage2", 7, 3)):
        assert not (draw(*other, SHAPE, 0.1).noise == made.noise).any()
    assert not (made.noise == made.latent_noise).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), SHAPE, (3, 3, 3), (4, 32, 32), (4, 128, 120)])
def test_samples_drawn_together_are_those_drawn_alone(shape: tuple[int, int, int]) -> None:
    samples = [(7, 0), (123_456_789, 3), (7, 1), (0, 0), (8, 0)]
    into = torch.full((5, *shape), torch.nan), torch.full((5, *shape), torch.nan)
    together = draw_all(3, "stage1", samples, shape, 0.5, into)
    for made, sample, latent_noise, noise in zip(together, samples, *into, strict=True):
        alone = draw(3, "stage1", *sample, shape, 0.5)
        assert same(made, alone)
        assert (made.noise_key, made.noise.shape) == (alone.noise_key, shape)
        assert (latent_noise.numpy() == alone.latent_noise).all()
        assert (noise.numpy() == alone.noise).all()


def test_threads_do_not_matter() -> None:
    made: dict[int, Draws] = {}
    threads = [threading.Thread(target=lambda i=i: made.update({i: draw(1, "s", i, 0, SHAPE, 0.1)})) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(made[i], draw(1, "s", i, 0, SHAPE, 0.1)) for i in range(32))


def test_timesteps_are_uniform_and_dropout_has_its_rate() -> None:
    made = [draw(0, "s", i, 0, (1, 1, 1), 0.1) for i in range(20_000)]
    timesteps = np.array([d.timestep for d in made])
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    counts = np.bincount(timesteps // 100, minlength=10)
    assert abs(counts - 2000).max() < 200
    assert np.mean([d.dropped for d in made]) == pytest.approx(0.1, abs=0.01)
    assert not any(draw(0, "s", i, 0, (1, 1, 1), 0.0).dropped for i in range(500))
    assert all(draw(0, "s", i, 0, (1, 1, 1), 1.0).dropped for i in range(500))


def test_normals_are_normal() -> None:
    values = normals_of(raw_words(key_of("n"), (0, 0, 0), 500_000)[None], 1_000_000)[0].astype(np.float64)
    assert values.mean() == pytest.approx(0, abs=0.005)
    assert values.std() == pytest.approx(1, abs=0.005)
    assert (values**4).mean() == pytest.approx(3, abs=0.05)
    assert (np.abs(values) < 1).mean() == pytest.approx(0.6827, abs=0.003)
    pairs = values.reshape(-1, 2)
    assert (pairs[:, 0] * pairs[:, 1]).mean() == pytest.approx(0, abs=0.005)
    words = np.array([[0, 2**64 - 1], [1, 2]], np.uint64)
    odd, even = normals_of(words, 3), normals_of(words, 4)
    assert np.isfinite(odd).all()
    assert (odd == even[:, :3]).all()
