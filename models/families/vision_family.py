"""Families with a vision model, which sees images when they are encoded for training."""

from typing import Any, Literal

from models.base import Role
from models.diffusers_family import DiffusersFamily


class VisionFamily(DiffusersFamily):
    """A family whose pipeline has a vision model besides the VAE."""

    @property
    def vision_components(self) -> tuple[str, ...]:
        """The vision model and its processor; nothing if this model of the family has none."""
        return ()

    @property
    def components(self) -> tuple[str, ...]:
        return (*super().components, *self.vision_components)

    def identity_components(self, role: Role) -> tuple[str, ...]:
        components = super().identity_components(role)
        return (*components, *self.vision_components) if role == "vae" else components

    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        if role == "media":
            return self.load_media_encoders("vae", *self.vision_components)
        return super().load_encoders(role)
