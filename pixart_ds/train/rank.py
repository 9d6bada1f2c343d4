"""The process of one rank: `python -m pixart_ds.train.rank`, started by the supervisor, torchrun or the deepspeed launcher."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from pixart_ds.config.freeze import open_run, read_stage, with_execution
from pixart_ds.config.schema import ExecutionConfig
from pixart_ds.errors import EXIT_BUG, EXIT_DONE, PixArtError
from pixart_ds.log import Log
from pixart_ds.train.stop import StopFlag

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs one rank of one launch and ends the process; its exit code says what kind of error ended it, if any."""
    stop = StopFlag().install()  # before torch is imported: a signal meanwhile must not kill the rank
    _stop_with_parent()
    options = _parser().parse_args(argv)
    from pixart_ds.engine.world import join_world, leave_world

    try:
        run = open_run(options.run)
        stage = read_stage(run, options.stage)
        if options.execution:
            stage = with_execution(stage, ExecutionConfig.model_validate_json(options.execution))
        layout = run.stage(stage.name)
        stop.watch(layout.stop_request)
        world = join_world(options.device)
        from pixart_ds.train.loop import Job, fit

        log = Log(
            stage.name,
            sys.stdout if world.rank == 0 else None,
            layout.attempt(options.attempt).log if world.rank == 0 else None,
        )
        fit(Job(run, stage, layout.attempt(options.attempt), options.launch), world, stop, log)
        leave_world()
        _leave(EXIT_DONE)
    except PixArtError as error:
        print(error, file=sys.stderr, flush=True)
        _leave(error.exit_code)
    except Exception:
        traceback.print_exc()
        _leave(EXIT_BUG)


def _stop_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the process that started this rank ends: a killed supervisor leaves no rank behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


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
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--launch", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument(
        "--execution", help="JSON of the attempt's `execution` section, where it differs from the recipe"
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher appends it; the environment says the same
    return parser


if __name__ == "__main__":
    main()
