"""From noise to pictures: classifier-free guidance over any of diffusers' schedulers, and sheets of what is made."""
