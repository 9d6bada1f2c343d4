"""The loader: the same samples and draws for any world, thread count and starting point; errors name the shard."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixart_ds.config.schema import SetConfig
from pixart_ds.data.loader import Loader
from pixart_ds.data.reader import MicroBatch, sample_digest
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.writer import SetWriter
from pixart_ds.diffusion.noise import draw
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order
from tests.helpers.sets import BUCKET_SIZES, GROUPS, RATIOS, description, finish, row, shard_file, tiny_set

BATCH = 12
SAMPLES = sum(count for _, count in GROUPS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("set") / "set")


def order_of(made: PreparedSet, latents: str) -> Order:
    return Order([made.rows_for(latents, SetConfig(path="x"))], seed=3, lanes=4, strip_length=4, window=2)


def loader_of(made: PreparedSet, latents: str = "48-buckets", **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 5,
        "condition_dropout": 0.3,
        "readers": 1,
    }
    return Loader(
        [made],
        order_of(made, latents),
        latents=latents,
        stage="stage9",
        seed=8,
        global_batch_size=BATCH,
        **{**options, **changes},
    )


def steps(made: PreparedSet, count: int = 8, after: int = 0, **changes: Any) -> list[list[MicroBatch]]:
    with loader_of(made, **changes) as loader:
        return [
            [batch.kept() for batch in loader.micro_batches(at)] for at in loader.steps(after, after + count * BATCH)
        ]


def by_sample(batches: list[MicroBatch]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Everything of each sample, by id and visit."""
    found = {}
    for batch in batches:
        for n, key in enumerate(zip(batch.sample_ids.tolist(), batch.visits.tolist(), strict=True)):
            real = batch.caption_embeds.split(batch.caption_lengths)[n]
            tensors = (batch.latents[n], batch.noise[n], real, batch.original_sizes[n], batch.aspect_ratios[n])
            scalars = (int(batch.timesteps[n]), bool(batch.dropped[n]), int(batch.class_labels[n]))
            found[key] = (*(tensor.numpy().tobytes() for tensor in tensors), *scalars)
    return found


def test_all_worlds_and_thread_counts_deliver_the_same(made: PreparedSet) -> None:
    whole = steps(made)
    assert sum(len(b.sample_ids) for step in whole for b in step) == 8 * BATCH
    for world in (2, 3, 4, 5, 17):
        ranks = [steps(made, rank=rank, world_size=world, readers=1 + rank % 3) for rank in range(world)]
        for number, step in enumerate(whole):
            parts = [batch for rank in ranks for batch in rank[number]]
            assert by_sample(parts) == by_sample(step)
            assert sum(b.digest for b in parts) % 2**64 == sum(b.digest for b in step) % 2**64
        assert world < 17 or any(not rank[0] for rank in ranks)  # empty shares are fine


def test_a_later_start_is_reached_without_walking(made: PreparedSet) -> None:
    assert [by_sample(step) for step in steps(made, 3, after=5 * BATCH)] == [
        by_sample(step) for step in steps(made)[5:]
    ]


def test_a_pass_serves_every_row_once_with_its_own_content(made: PreparedSet) -> None:
    batches = [batch for step in steps(made, 11) for batch in step]  # 132 images: 4 passes of 33
    found = by_sample(batches)
    assert sorted(found) == [(sample, visit) for sample in range(SAMPLES) for visit in range(4)]
    partitions = [partition for partition, count in GROUPS for _ in range(count)]
    for batch in batches:
        assert len({partitions[sample] for sample in batch.sample_ids}) == 1
        for n, sample in enumerate(batch.sample_ids.tolist()):
            wanted = row(sample, partitions[sample])
            assert batch.latents.shape[2:] == BUCKET_SIZES[partitions[sample]]
            assert batch.original_sizes[n].tolist() == [wanted.original_height, wanted.original_width]
            assert batch.aspect_ratios[n].item() == RATIOS[partitions[sample]]
            assert batch.class_labels[n].item() == wanted.class_label
            assert np.array_equal(batch.caption_embeds.split(batch.caption_lengths)[n].numpy(), wanted.caption_embeds)
            draws = draw(8, "stage9", sample, int(batch.visits[n]), (4, *batch.latents.shape[2:]), 0.3)
            moments = wanted.latents["48-buckets"].astype(np.float32)
            latents = (moments[:4] + moments[4:] * draws.latent_noise - np.float32(0.25)) * np.float32(0.5)
            assert np.array_equal(batch.latents[n].numpy(), latents)
            assert np.array_equal(batch.noise[n].numpy(), draws.noise)
            assert (batch.timesteps[n].item(), batch.dropped[n].item()) == (draws.timestep, draws.dropped)


def test_digest_is_the_sum_of_the_samples_hashes(made: PreparedSet) -> None:
    for batch in steps(made, 1)[0]:
        total = 0
        for sample, visit, timestep in zip(
            batch.sample_ids.tolist(), batch.visits.tolist(), batch.timesteps.tolist(), strict=True
        ):
            key = draw(8, "stage9", sample, visit, tuple(batch.latents.shape[1:]), 0.3).noise_key  # type: ignore[arg-type]
            total += sample_digest(sample, visit, timestep, key)
        assert batch.digest == total % 2**64


def test_a_square_stage_mixes_the_partitions(made: PreparedSet) -> None:
    batches = [batch for step in steps(made, 3, latents="32-square") for batch in step]
    assert {tuple(batch.latents.shape[2:]) for batch in batches} == {(4, 4)}
    assert all((batch.aspect_ratios == 1).all() for batch in batches)
    assert max(len(batch.sample_ids) for batch in batches) == 4  # 12 in three near-equal pieces of at most 5


def test_captions_without_tokens_have_one_of_zeros(tmp_path: Path) -> None:
    (batch, *_) = steps(tiny_set(tmp_path, tokens=0), 1)[0]
    assert set(batch.caption_lengths) == {1}
    assert batch.caption_embeds.shape == (len(batch.sample_ids), 6)
    assert not batch.caption_embeds.any()


def test_a_net_without_captions_is_not_given_any(made: PreparedSet) -> None:
    whole, bare = (steps(made, 2, captions=captions)[1] for captions in (True, False))
    for one, two in zip(whole, bare, strict=True):
        assert two.caption_embeds.shape == (0, 6)
        assert two.caption_lengths == ()
        assert torch.equal(one.class_labels, two.class_labels)
        assert torch.equal(one.latents, two.latents)
        assert one.digest == two.digest


def test_memory_is_reused_and_a_micro_batch_is_valid_until_the_next(made: PreparedSet) -> None:
    kept, places = [], set()
    with loader_of(made, ahead=2) as loader:
        for at in loader.steps(0, 12 * BATCH):
            for batch in loader.micro_batches(at):
                before = batch.kept()
                time.sleep(0.002)  # the readers go on
                assert torch.equal(batch.latents, before.latents)
                assert torch.equal(batch.caption_embeds, before.caption_embeds)
                places.add(batch.latents.untyped_storage().data_ptr())
                kept.append(before)
    assert len(kept) > 20
    assert len(places) <= 12  # four buffers, each grown a few times
    assert by_sample(kept) == by_sample([batch for step in steps(made, 12) for batch in step])


def test_steps_must_be_taken_in_their_sequence(made: PreparedSet) -> None:
    with loader_of(made) as loader:
        for at in loader.steps(0, 3 * BATCH):
            with pytest.raises(ValueError, match="is not the next one"):
                list(loader.micro_batches(at + BATCH))
            list(loader.micro_batches(at))


def test_close_ends_the_threads(made: PreparedSet) -> None:
    loader = loader_of(made, readers=3)
    for at in loader.steps(0, 5 * BATCH):
        list(loader.micro_batches(at))
        break
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader-", "fetcher-"))]


@pytest.mark.parametrize("fault", ["flipped", "swapped", "vanished"])
def test_damage_is_named_and_never_delivered(tmp_path: Path, fault: str) -> None:
    made = tiny_set(tmp_path)
    loader = loader_of(made)
    shard = shard_file(made.path, "latents-48-buckets", 2)
    if fault == "flipped":
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
        words = "the shard is damaged: its xxh3 hash is"
    elif fault == "swapped":  # the same size and partition, but other rows
        other = shard_file(made.path, "latents-48-buckets", 0)
        one, two = shard.read_bytes(), other.read_bytes()
        shard.write_bytes(two)
        other.write_bytes(one)
        words = "the shard is damaged"
    else:
        shard.unlink()
        words = "the shard is not there"

    def walk() -> None:
        with loader:
            for at in loader.steps(0, 5 * BATCH):
                list(loader.micro_batches(at))

    with pytest.raises(DataError) as caught:
        walk()
    assert words in str(caught.value)
    assert "part-0000" in str(caught.value)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("part-00002", r"says that it is row \d of part [02] instead of row \d of part [02]"),
        ("part-00001", r"row \d has latents of \d+ bytes, its bucket \d+"),
    ],
)
def test_rows_that_are_not_the_planned_ones_are_refused(tmp_path: Path, other: str, words: str) -> None:
    """Index and shards agree with each other, but not with the manifest: two parts changed places."""
    made = tiny_set(tmp_path)
    index = Path(made.path) / "latents-48-buckets/index.json"
    shards = json.loads(index.read_text())
    first, second = shards["shards"][0], shards["shards"][int(other[-1])]
    first["raw_data"], second["raw_data"] = second["raw_data"], first["raw_data"]
    index.write_text(json.dumps(shards))
    with pytest.raises(DataError, match=words):
        steps(PreparedSet.open(made.path), 5)


def test_latents_of_another_shape_are_refused(tmp_path: Path) -> None:
    """As many bytes as those of the bucket, but lying instead of standing."""
    writer = SetWriter(tmp_path, description())
    writer.write_part(0, 0, [row(number, 2) for number in range(8)])
    finish(writer)
    with pytest.raises(DataError, match=r"row \d has latents of shape \(8, 8, 4\), its bucket \(8, 4, 8\)"):
        steps(PreparedSet.open(tmp_path), 1)


def test_batches_move_to_a_device_whole(made: PreparedSet) -> None:
    moved = steps(made, 1)[0][0].to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(moved).values() if isinstance(tensor, torch.Tensor)} == {"meta"}
    assert isinstance(moved.sample_ids, np.ndarray)


# ---- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_gets_what_a_cpu_gets_however_late_its_copies_are(made: PreparedSet) -> None:
    """Buffers are pinned, and are not read to again before they have been copied."""
    wanted = [by_sample(step) for step in steps(made)]
    found: list[list[MicroBatch]] = []
    with loader_of(made, device="cuda") as loader:
        for at in loader.steps(0, 8 * BATCH):
            found.append([])
            for batch in loader.micro_batches(at):
                assert all(tensor.is_cuda for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor))
                found[-1].append(batch)
                torch.cuda._sleep(20_000_000)  # some 10 ms, which the next copies stand behind
        buffers = [*loader._free, *(buffer for buffer, _ in loader._lent)]
        assert any(len(buffer._whole) for buffer in buffers)
        assert all(buffer._whole.is_pinned() for buffer in buffers if len(buffer._whole))
    assert [by_sample([batch._mapped(torch.Tensor.cpu) for batch in step]) for step in found] == wanted
