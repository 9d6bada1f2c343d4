"""What a run cost: python tools/cost_report.py RUN [--json] [--country FRA] [--pue 1.2] [--price 0.97] [--device v100-sxm2]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installing the package

from pixart_ds.ledger.report import main

if __name__ == "__main__":
    sys.exit(main())
