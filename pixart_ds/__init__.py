"""pixart_ds: trains PixArt-α from pictures to a finished model, on a SLURM cluster, through everything a cluster does."""

__version__ = "0.1.0"
