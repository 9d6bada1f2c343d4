"""The options of the doctor; light, since the command line of every verb is built with them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, STAGE, and how thoroughly to look."""
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="folder of a run; without one only the machine is looked at"
    )
    parser.add_argument(
        "stage", nargs="?", metavar="STAGE", help="name of a stage (default: the first that is not done)"
    )
    parser.add_argument("--profile", help="a site: what its nodes have, on a login node that has none of it")
    parser.add_argument("--quick", action="store_true", help="what differs between nodes, in seconds: before every job")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what the ranks compute on (default: the profile's, else cuda); cuda: it is a failure if there is no GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON; with --quick on one line")
