"""How a rank runs its share: in micro-batches of one bucket each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pixart_ds.plan.order import StepPlan


def micro_batches(share: StepPlan, micro_batch_size: int) -> list[StepPlan]:
    """The share sorted by bucket, in near-equal pieces of one bucket and at most `micro_batch_size` samples."""
    by_bucket = share.take(np.argsort(share.bucket, kind="stable"))
    edges = [*np.flatnonzero(np.diff(by_bucket.bucket, prepend=-1)), len(share)]
    pieces: list[StepPlan] = []
    for start, end in pairwise(edges):
        count = -(-(end - start) // micro_batch_size)
        cuts = start + (end - start) * np.arange(count + 1) // count
        pieces += [by_bucket.take(slice(int(a), int(b))) for a, b in pairwise(cuts)]
    return pieces
