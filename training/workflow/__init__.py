"""A workflow for ComfyUI that draws a sample of a run."""
