"""The frozen encoders: pictures to latents and back (diffusers), captions to features (transformers)."""
