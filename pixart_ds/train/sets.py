"""The prepared sets of a stage: opened, held against the recipe, joined into one order."""

from __future__ import annotations

from pixart_ds.config.schema import StageConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.errors import ConfigError
from pixart_ds.plan.order import Order

_AGREED = ("scaling_factor", "shift_factor", "vae_fingerprint", "text_fingerprint", "ratios", "caption_codec")
"""What the sets of one stage say alike."""


def open_sets(stage: StageConfig) -> list[PreparedSet]:
    """Opens and checks every set of the stage.

    Raises:
        DataError: A set is missing, unfinished or damaged.
        ConfigError: The sets do not fit the recipe or each other; all reasons at once.
    """
    sets = [PreparedSet.open(config.path) for config in stage.data.sets]
    problems = [
        line
        for prepared, config in zip(sets, stage.data.sets, strict=True)
        for line in _problems(stage, prepared, config.path)
    ]
    for prepared, config in zip(sets[1:], stage.data.sets[1:], strict=True):
        for key in _AGREED:
            first, other = getattr(sets[0].description, key), getattr(prepared.description, key)
            if first != other:
                problems.append(f"{config.path}: {key} {other} differs from that of {stage.data.sets[0].path}, {first}")
    if stage.previews.every is not None and stage.model.kind == "pixart" and not sets[0].prompts:
        problems.append(f"{stage.data.sets[0].path}: there are no held prompts, which previews.every needs")
    if problems:
        raise ConfigError(
            f"the data of {stage.name} do not fit its recipe:\n" + "\n".join(f"  - {line}" for line in problems),
            remedy="mend the recipe, or prepare the set with the encoders that the recipe is written for",
        )
    return sets


def contents_of(stage: StageConfig, sets: list[PreparedSet]) -> dict[str, str]:
    """What each set holds, by its path, for a comparison later."""
    return {
        config.path: f"{prepared.num_samples} samples, {prepared.fingerprint}"
        for config, prepared in zip(stage.data.sets, sets, strict=True)
    }


def _problems(stage: StageConfig, prepared: PreparedSet, path: str) -> list[str]:
    net, about = stage.model, prepared.description
    problems = []
    if about.latent_channels != net.in_channels:
        problems.append(
            f"{path}: latents have {about.latent_channels} channels, model.in_channels is {net.in_channels}"
        )
    if net.kind == "pixart":
        assert net.caption_channels is not None
        assert net.max_tokens is not None
        if about.caption_channels != net.caption_channels:
            problems.append(
                f"{path}: caption features have {about.caption_channels} channels, model.caption_channels is {net.caption_channels}"
            )
        if about.max_tokens > net.max_tokens:
            problems.append(
                f"{path}: captions have up to {about.max_tokens} tokens, model.max_tokens is {net.max_tokens}"
            )
    elif len(about.classes) > (net.num_classes or 0):
        problems.append(f"{path}: there are {len(about.classes)} classes, model.num_classes is {net.num_classes}")
    info = about.latents.get(stage.data.latents)
    if info is not None:  # a name that is not there has its own message, from the set
        odd = [size for size in info.sizes if size[0] % net.patch_size or size[1] % net.patch_size]
        if odd:
            problems.append(f"{path}: latents of sizes {odd} cannot be cut into patches of {net.patch_size}")
    return problems


def order_of(stage: StageConfig, sets: list[PreparedSet]) -> Order:
    """The order in which the stage reads its sets."""
    rows = [
        prepared.rows_for(stage.data.latents, config) for prepared, config in zip(sets, stage.data.sets, strict=True)
    ]
    shape = stage.order
    return Order(rows, seed=stage.seed, lanes=shape.lanes, strip_length=shape.strip_length, window=shape.window)


def reading_of(
    stage: StageConfig, sets: list[PreparedSet], order: Order, first_rank: int, ranks: int, world_size: int
) -> str:
    """What a node's ranks read, for the log: how much of it lies in lanes of other nodes too, and what a cache must hold.

    Args:
        first_rank, ranks: The node's.
    """
    live = order.live_groups(first_rank, ranks, world_size)
    size = 0
    for number, group in zip(*(part.tolist() for part in order.place_of(live)), strict=True):
        size += sum(int(sets[number].index(name).sizes[group]) for name in ("captions", stage.data.latents))
    shared = order.shared_part(first_rank, ranks, world_size)
    lanes = f"{order.lanes * ranks / world_size:.3g} of {order.lanes} lanes"
    whose = (
        "the same shards in every pass"
        if shared == 0
        else f"{shared:.0%} of it lies in lanes that other nodes read too"
    )
    limit = stage.execution.cache.limit_gb
    small = (
        "" if limit is None or limit * 1e9 >= size else f"; execution.cache.limit_gb {limit:g} is too small for that"
    )
    return f"this node reads {lanes}: {whose}; up to {len(live)} row groups, {size / 1e9:.3g} GB, are in use at once{small}"
