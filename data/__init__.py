"""Images and captions -> rows of latents and conditioning on disk -> the batches of a run."""
