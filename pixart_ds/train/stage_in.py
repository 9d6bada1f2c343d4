"""`pixart-ds stage-in` on one node: which shards of a stage go into the cache, before it trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pixart_ds.config.schema import StageConfig
from pixart_ds.data.cache import options_of
from pixart_ds.data.stage_in import StageIn, stage_in
from pixart_ds.data.store import is_remote
from pixart_ds.errors import ConfigError
from pixart_ds.train.sets import open_sets, order_of


def needless(stage: StageConfig) -> str | None:
    """Why there is nothing to stage in; None if there is something."""
    mode = stage.execution.cache.mode
    if mode == "node-job":
        return (
            "execution.cache.mode is node-job: each job makes this cache anew, and the loader fetches ahead itself; "
            "set node-persistent to keep shards between jobs"
        )
    if mode == "shared" and not any(is_remote(each.path) for each in stage.data.sets):
        return "execution.cache.mode is shared, and all sets lie in folders: they are read in place"
    return None


def check_folder(stage: StageConfig) -> None:
    """Raises ConfigError where an object store is to be copied to a place that nobody has named."""
    cache = stage.execution.cache
    if cache.mode == "shared" and cache.folder is None:
        raise ConfigError(
            "the sets lie in an object store, and no folder is named for the copy that all nodes read",
            where="execution.cache.folder",
            remedy="name one on the shared file system: --set execution.cache.folder=/scratch/me/cache, or cache: in the profile",
        )


def part_of(nodes: str | None, node: int | None) -> tuple[int, int] | None:
    """(N, K) of `--nodes N --node K`; None if neither is said.

    Raises:
        ConfigError: Only one of them is, or there is no such node.
    """
    if nodes is None and node is None:
        return None
    if nodes is None or node is None or not nodes.isdigit() or not 0 <= node < int(nodes):
        raise ConfigError(
            f"--nodes {nodes} --node {node} names no part of the stage",
            remedy="say both, such as --nodes 8 --node 0 to --node 7; or neither, for all shards; or --profile, for a job",
        )
    return int(nodes), node


def fill_here(
    stage: StageConfig,
    part: tuple[int, int] | None,
    report: Callable[[str], None],
    *,
    dry_run: bool = False,
) -> StageIn:
    """Fills this node's cache.

    Args:
        stage: Its cache is no `node-job`.
        part: (nodes, node): only the lanes that this node of so many reads, counted from 0; None: everything.
        report: Is told how far it is.
        dry_run: Only look.

    Raises:
        ConfigError: The sets do not fit the recipe, or no folder is named.
        DataError: A set or shard cannot be read, or the cache cannot be written.
        MachineError: The copy that all nodes read does not fit.
    """
    check_folder(stage)
    sets = open_sets(stage)
    options = options_of(stage.execution.cache, "")
    assert options is not None
    if options.in_place:  # whole, whatever a stage selects: it is read without the store
        sets = [prepared for prepared in sets if is_remote(prepared.path)]
        counts = [len(prepared.counts) for prepared in sets]
        places = np.repeat(np.arange(len(sets)), counts), np.concatenate([np.arange(count) for count in counts])
    else:
        order = order_of(stage, sets)
        nodes, node = part or (1, 0)
        places = order.place_of(order.groups_of(node, 1, nodes))
    return stage_in(sets, stage.data.latents, places, options, report=report, dry_run=dry_run)
