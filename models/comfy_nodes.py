"""Knowledge about a family of models as ComfyUI has it: the nodes with which it draws."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ComfyNodes:
    """The nodes and files with which ComfyUI draws with a family of models."""

    text_encoders: tuple[str, ...] = ()
    """Usual names of the text encoders' files. Empty: the text encoders are in the checkpoint."""
    text_encoder_type: str = ""
    """The model that the node for text encoders asks for."""
    vae: str = ""
    """Usual name of the VAE's file. Empty: the VAE is in the checkpoint."""
    latents: str = "EmptySD3LatentImage"
    """The node that makes empty latents."""
    shift: str = ""
    """The node that sets the shift of the noise levels, for flow matching."""
    schedule: str = "simple"
    """ComfyUI's schedule with the noise levels of diffusers' pipeline, for flow matching."""
    has_size_scheduler: bool = False
    """True if noise levels come from the node Flux2Scheduler, which is given the image size."""
    zeroes_missing_negative: bool = False
    """True if the pipeline uses zeros, not the embeddings of an empty text, without a negative prompt."""
    text_padding: int = 0
    """T5: tokens of padding after a text. Only used if text_length or this is not 0."""
    text_length: int = 0
    """T5: tokens to which a text is padded, where ComfyUI's default is another number."""
    separate_vae: str = ""
    """For checkpoints: usual name of the VAE's file for a base model without a VAE."""
    text_image_node: str = ""
    """The node that encodes a text together with control images, if the text encoder sees them."""
    control_scale: str = ""
    """The node that scales control images to the sizes of the model."""
    reference_method: str = ""
    """The method by which the model is given control images, if it is not ComfyUI's default."""
    difference: str = ""
    """A difference between ComfyUI and the pipeline that nodes cannot remove, for the note."""


@dataclass(frozen=True)
class ComfyGuidance:
    """Guidance as ComfyUI has it."""

    cfg: float
    """Classifier-free guidance scale. 1: without, and without a negative prompt."""
    distilled: float | None = None
    """Guidance input of a guidance-distilled model."""


def cfg_guidance(scale: float) -> ComfyGuidance:
    """Return classifier-free guidance, which pipelines of diffusers use above 1."""
    return ComfyGuidance(max(scale, 1.0))
