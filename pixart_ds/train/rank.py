"""The process of one rank: `python -m pixart_ds.train.rank`, started by the supervisor, srun, torchrun, deepspeed, or by itself.

The supervisor says which attempt it is; otherwise rank 0 takes the next one, and all ranks hear of it (docs/launching.md).
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pixart_ds import files
from pixart_ds.config.freeze import open_run, override_execution, read_stage
from pixart_ds.engine.environment import PARENT_PID, RankEnvironment, read_environment
from pixart_ds.errors import EXIT_BUG, EXIT_DONE, EXIT_STOPPED, PixArtError
from pixart_ds.layout import AttemptLayout, RunLayout, StageLayout
from pixart_ds.log import Log
from pixart_ds.train.attempt import AttemptRecord, RankFailure
from pixart_ds.train.pulse import Pulse
from pixart_ds.train.stop import StopFlag

if TYPE_CHECKING:
    from pixart_ds.engine.world import World

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_REPORT_S = 30.0


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs one rank of one launch and ends the process; its exit code says what kind of error ended it, if any."""
    stop = StopFlag().install()  # before torch is imported: a signal meanwhile must not kill the rank
    options = _parser().parse_args(argv)
    try:
        code = _run(options, stop)
    except Exception as error:
        code = _tell(error)
    _leave(code)


def _run(options: argparse.Namespace, stop: StopFlag) -> int:
    """Joins the other ranks and trains, in the attempt that the supervisor began or in one of our own; returns the exit code."""
    given = read_environment(os.environ)
    if given.launcher != "alone":  # a process that a person started goes on when its shell ends, as nohup promises
        _stop_with_parent()
    if options.device == "cpu":  # on busy cores two threads are many times slower than one
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from pixart_ds.engine.world import join_world, leave_world
    from pixart_ds.meters.energy import EnergyMeter
    from pixart_ds.train.figures import device_of

    run = open_run(options.run)
    stage = override_execution(read_stage(run, options.stage), options.sets)
    layout = run.stage(stage.name)
    stop.watch(layout.stop_request)
    faulthandler.register(signal.SIGQUIT)  # the supervisor asks a rank that hangs for its stacks
    attempt = None if options.attempt is None else layout.attempt(options.attempt)
    pulse = None if attempt is None else Pulse(attempt, options.launch, given.rank).start()
    world = join_world(options.device, environment=given)
    about = device_of(world)
    # one meter for a node: with one for each rank its energy would count as often
    meter = (
        EnergyMeter(world.device.type, world.local_size, kind=about["device_kind"]).start()
        if world.local_rank == 0
        else None
    )

    def train(attempt: AttemptLayout) -> None:
        from pixart_ds.train.loop import fit
        from pixart_ds.train.training import Job

        first = world.rank == 0
        log = Log(stage.name, sys.stdout if first else None, attempt.log if first else None)
        living = pulse or Pulse(attempt, options.launch, world.rank).start()
        living.tell(meter.to_json if meter else None, **about)
        try:
            fit(Job(run, stage, attempt, options.launch, living), world, stop, log)
            leave_world()
        finally:
            if meter:
                meter.stop()
            living.stop()

    if attempt is None:
        return _own_attempt(layout, world, given, stop, train)
    train(attempt)
    return EXIT_DONE


def _own_attempt(
    layout: StageLayout, world: World, given: RankEnvironment, stop: StopFlag, train: Callable[[AttemptLayout], None]
) -> int:
    """Without a supervisor: rank 0 begins the next attempt, keeps its record while all train, and writes how it ended.

    Returns:
        Of a world of one that no launcher started, what the supervisor would return. Else 0 also after a stop: launchers take any
        other code for a crash, and end the ranks that are still writing.
    """
    from pixart_ds.engine.agree import on_first
    from pixart_ds.engine.world import leave_world

    record: AttemptRecord | None = None

    def begin() -> int | None:
        nonlocal record
        record = AttemptRecord.begin(layout, world.device.type, Log(layout.root.name))
        if record is None:
            return None
        record.ranks_started(world.size, given.launcher)
        return record.attempt.number

    number = on_first(world, begin)
    if number is None:
        leave_world()
        return EXIT_DONE
    failure: RankFailure | None = None
    with record.kept() if record else nullcontext():
        try:
            train(layout.attempt(number))
        except Exception as error:
            failure = RankFailure(f"rank {world.rank} raised {type(error).__name__}: {error}", _tell(error))
    if record:
        outcome = record.end(stop.reason, failure)
        _report(layout)
        if given.launcher == "alone":
            return int(outcome["exit_code"])
    return failure.code if failure else EXIT_DONE


def _report(layout: StageLayout) -> None:
    """Writes the run's report.html anew, as a supervisor does: by the command, since programs do not know each other."""
    run = RunLayout(layout.root.parent)
    command = [sys.executable, "-m", "pixart_ds", "cost", str(run.root), "--format", "html", "--out", str(run.report)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_REPORT_S)
        said = answer.stderr.strip() if answer.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        print(f"report.html is not written anew: {said}", file=sys.stderr, flush=True)


def _tell(error: Exception) -> int:
    """Says on stderr what went wrong, and returns the exit code of it."""
    if isinstance(error, OSError):
        error = files.disk_error(error, Path.cwd()) or error
    if isinstance(error, PixArtError):
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    traceback.print_exception(error)
    return EXIT_BUG


def _stop_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the process that started this rank ends: a killed supervisor leaves no rank behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.environ.get(PARENT_PID, str(os.getppid())) != str(os.getppid()):  # it ended before the kernel was asked
        _leave(EXIT_STOPPED)


def _leave(code: int) -> NoReturn:
    """Ends at once, everything being written: after an error, peers may be waiting in a collective, and an orderly exit would wait
    with them; after success, the process group's threads now and then abort an interpreter that takes itself down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pixart_ds.train.rank", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--attempt", type=int, help="number of the attempt that a supervisor began (default: the next)")
    parser.add_argument("--launch", type=int, default=1, help="number of this start of the ranks within the attempt")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key for this attempt only",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher appends it; the environment says the same
    return parser


if __name__ == "__main__":
    main()
