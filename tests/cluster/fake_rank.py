"""A rank without torch: does what `--script a,b,…` (one for each rank) says; its other arguments are the real one's.

A script's name may end with `-once`: then the first launch does it, and later ones are done.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path


class Rank:
    """This rank and the files that it may write."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rank, self.launch = int(os.environ["RANK"]), int(options.launch)
        self.stage = Path(options.run) / options.stage
        self.attempt = self.stage / "attempts" / f"{int(options.attempt):04d}"
        self.asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: self.asked.append(number))

    def first_writes(self, path: Path, text: str) -> None:
        if self.rank == 0:
            path.write_text(text)

    def wait(self) -> None:
        while not self.asked:
            time.sleep(0.02)

    def beat(self, beat: int) -> None:
        """A sign of life, as the real ones give."""
        said = {
            "rank": self.rank,
            "launch": self.launch,
            "host": "here",
            "pid": os.getpid(),
            "beat": beat,
            "own_s": 0.1,
        }
        said |= {"phase": "together", "for_s": 0.1, "deadline": "step", "images_seen": 64}
        folder = self.attempt / "ranks"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.rank:05d}.new").write_text(json.dumps(said))
        os.replace(folder / f"{self.rank:05d}.new", folder / f"{self.rank:05d}.json")

    # ---- scripts -------------------------------------------------------------------------------------------------

    def done(self) -> None:
        time.sleep(0.3)
        self.beat(0)
        self.first_writes(self.stage / "DONE.json", "{}")

    def save_when_asked(self) -> None:
        self.wait()
        self.first_writes(self.attempt / "stopped.json", '{"images_seen": 640, "reason": "SIGTERM"}')

    def save_late(self) -> None:
        self.wait()
        time.sleep(1.5)
        self.first_writes(self.attempt / "stopped.json", '{"images_seen": 640, "reason": "SIGUSR1"}')

    def leave_when_asked(self) -> None:
        self.wait()

    def die_when_asked(self) -> None:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    def ignore(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(120)

    def killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def roll_back(self) -> None:
        self.first_writes(self.attempt / f"rolled-back-l{self.launch:02d}.json", '{"reason": "the loss was too high"}')

    def go_on(self) -> None:
        """Moves until the launch is ended."""
        for beat in range(600):
            self.beat(beat)
            time.sleep(0.1)

    def hang(self) -> None:
        faulthandler.register(signal.SIGQUIT)
        self.beat(0)
        time.sleep(60)

    def exit(self, code: str) -> None:
        print("the set is damaged", file=sys.stderr, flush=True)
        sys.exit(int(code))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--run", "--stage", "--attempt", "--launch", "--device", "--script"):
        parser.add_argument(name)
    options = parser.parse_args()
    rank = Rank(options)
    scripts = options.script.split(",")
    script = scripts[rank.rank % len(scripts)]
    variables = json.dumps({key: value for key, value in os.environ.items() if key.isupper()})
    (rank.attempt / f"env-{rank.rank}.json").write_text(variables)
    print(f"rank {rank.rank} of {os.environ['WORLD_SIZE']}: {script}", flush=True)
    if rank.rank == 0:
        with open(rank.attempt / "metrics.jsonl", "a") as metrics:
            metrics.write('{"images_seen": 640, "loss": 0.5}\n')
    if script.startswith("exit-"):
        rank.exit(script.removeprefix("exit-"))
    once = script.removesuffix("-once")
    name = once if script == once or rank.launch == 1 else "done"
    getattr(rank, name.replace("-", "_"))()


if __name__ == "__main__":
    main()
