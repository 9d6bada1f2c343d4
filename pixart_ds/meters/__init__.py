"""What the run costs the site, measured: the energy of this node's devices, and what Slurm has booked. No torch."""
