"""What the cost report's page adds to the look of every page: the colours of what it tells, and its samples."""

# The colours of parts keep their sequence: neighbours in a stacked bar can be told apart by the colour-blind, too.

STYLE = """
.productive, .stopped, .ours, .smooth { color: var(--blue); }
.startup { color: var(--aqua); }
.data_wait { color: var(--yellow); }
.checkpoint, .done { color: var(--green); }
.evaluation, .running { color: var(--violet); }
.rework { color: var(--red); }
.failed { color: var(--bad); }
.lost { color: var(--yellow); }
.idle { color: var(--grey); }
.paper { color: var(--faint); }
.unattributed, .other { color: var(--pale); }
.rival { color: var(--rival); }
.again { color: var(--orange); }
.raw { color: var(--pale); }
rect.wait { fill: none; stroke: var(--faint); stroke-width: 1; }
.key.wait { background: none; border: 1px solid var(--faint); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 4px 20px; }
@media print { .samples { grid-template-columns: repeat(2, 1fr); } }
"""
"""CSS."""
