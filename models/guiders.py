"""Guidance that is a component of a pipeline, its guider, and no argument of its call."""

from typing import Any

from models.quiet import hide_guider_notes


def set_guider(pipeline: Any, scale: float) -> None:
    """Give a pipeline a guider with this guidance scale."""
    from diffusers import ClassifierFreeGuidance

    hide_guider_notes()
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=scale)
