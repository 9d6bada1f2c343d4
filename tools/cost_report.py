"""What a run cost: python tools/cost_report.py RUN [--format json] [--country FRA] …; or --paper alone: the paper's account."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installing the package

from pixart_ds.ledger.report import main

if __name__ == "__main__":
    sys.exit(main())
