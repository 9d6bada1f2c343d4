"""`python -m pixart_ds`: the same as the command `pixart-ds`."""

import sys

from pixart_ds.cli import main

sys.exit(main())
