"""From noise to latents: classifier-free guidance over any of diffusers' schedulers."""
