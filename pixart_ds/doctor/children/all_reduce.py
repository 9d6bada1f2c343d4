"""One of the ranks that reduce a tensor together; rank 0 prints how fast, as JSON. RANK and the others are in the environment."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

from pixart_ds.errors import EXIT_MACHINE

ROUNDS = 5
_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_TIMEOUT_S = 60


def bus_bandwidth(size: int, ranks: int, seconds: float) -> float:
    """Bytes a second through the slowest link of a ring: each rank sends 2 (n - 1) / n of the tensor."""
    return 2 * (ranks - 1) / ranks * size / seconds


def main(device: str) -> int:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=_TIMEOUT_S))
    tensor = torch.full((_BYTES[device] // 4,), float(rank + 1), device=place)
    expected, times = float(sum(range(1, ranks + 1))), []
    for number in range(ROUNDS + 1):
        tensor.fill_(rank + 1)
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        if number:  # the first one connects
            times.append(time.perf_counter() - began)
        if not bool((tensor == expected).all()):
            print(f"rank {rank}: the sum is not {expected:g} everywhere", file=sys.stderr)
            return EXIT_MACHINE
    if rank == 0:
        seconds = sorted(times)[len(times) // 2]
        rate = bus_bandwidth(_BYTES[device], ranks, seconds)
        print(json.dumps({"ranks": ranks, "bytes": _BYTES[device], "bytes_per_second": rate}), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as the real ranks end: backends' threads may wait for each other at the interpreter's end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
