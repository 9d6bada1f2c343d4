"""The diffusion process: schedule, loss, and the random draws of a sample."""
