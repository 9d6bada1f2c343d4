"""The options of the cost report; light, since the command line of every verb is built with them."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("text", "json", "csv", "html", "md")
RATES = ("device", "country", "pue", "price_per_hour", "watts", "host_watts", "grams_per_kwh")
"""Options that go before what the jobs' profiles said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, for both commands."""
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument("--paper", action="store_true", help="the paper's own account and its rivals', from its tables")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--out", type=Path, help="write it to this file instead of the terminal")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--sacct", type=Path, metavar="FILE", help="Slurm's account from a dump of sacct instead of asking it"
    )
    asked.add_argument("--no-sacct", action="store_true", help="reckon by the ledger alone")
    parser.add_argument("--profile", help="a site, in place of what the jobs' own profiles said of price, grid and PUE")
    parser.add_argument("--device", help="what to reckon the devices as: v100-sxm2, a100-80gb, …")
    parser.add_argument("--country", help="whose electricity: ISO code of three letters, or WORLD")
    parser.add_argument("--grams-per-kwh", type=float, help="CO2e of the site's own electricity, location-based")
    parser.add_argument("--pue", type=float, help="power usage effectiveness of the site")
    parser.add_argument("--price", type=float, dest="price_per_hour", help="dollars for a device-hour")
    parser.add_argument("--watts", type=float, help="of a device where its energy was not measured")
    parser.add_argument("--host-watts", type=float, help="of a device's share of the node around it")
