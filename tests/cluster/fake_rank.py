"""A rank without torch: does what `--script a,b,…` (one for each rank) says; its other arguments are the real one's."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--run", "--stage", "--attempt", "--launch", "--device", "--script"):
        parser.add_argument(name)
    options = parser.parse_args()
    stage = Path(options.run) / options.stage
    attempt = stage / "attempts" / f"{int(options.attempt):04d}"
    rank = int(os.environ["RANK"])
    scripts = options.script.split(",")
    script = scripts[rank % len(scripts)]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (attempt / f"env-{rank}.json").write_text(json.dumps({k: v for k, v in os.environ.items() if k.isupper()}))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}: {script}", flush=True)
    if rank == 0:
        with open(attempt / "metrics.jsonl", "a") as metrics:
            metrics.write('{"images_seen": 640, "loss": 0.5}\n')
    if script == "done":
        time.sleep(0.3)
        if rank == 0:
            (stage / "DONE.json").write_text("{}")
    elif script == "save-when-asked":
        while not asked:
            time.sleep(0.02)
        if rank == 0:
            (attempt / "stopped.json").write_text('{"images_seen": 640, "reason": "SIGTERM"}')
    elif script == "leave-when-asked":
        while not asked:
            time.sleep(0.02)
    elif script == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(120)
    elif script == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif script.startswith("exit-"):
        print("the set is damaged", file=sys.stderr, flush=True)
        sys.exit(int(script.removeprefix("exit-")))


if __name__ == "__main__":
    main()
