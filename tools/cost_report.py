"""What runs cost: python tools/cost_report.py RUN… [--format text|json|csv|html|md] …; or --paper: the paper's account."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installing the package

from pixart_ds.report.command import main

if __name__ == "__main__":
    sys.exit(main())
