"""The nodes with which ComfyUI gives control images to a model that edits."""

from models.comfy_nodes import ComfyNodes
from training.workflow.graph import Graph, Output, Value

DEFAULT_IMAGE = "example.png"
"""An image that every ComfyUI has."""
LARGE_IMAGE = 1024 * 1024
"""Area in pixels from which FLUX.2's pipeline shrinks control images."""


class ControlNodes:
    """Adds the control images of a sample to a graph."""

    def __init__(
        self, graph: Graph, nodes: ComfyNodes, vae: Output, sizes: tuple[tuple[int, int], ...]
    ):
        """`sizes`: width and height of each control image."""
        self.graph, self.nodes, self.vae = graph, nodes, vae
        self.images: list[Output] = []
        self.latents: list[Output] = []
        for width, height in sizes:
            image = self._load(width * height)
            self.images.append(image)
            if not nodes.text_image_node:
                latents = self._add("VAEEncode", pixels=image, vae=vae)
                self.latents.append(latents)

    def _load(self, area: int) -> Output:
        """Add the nodes that load an image and scale it. `area`: in pixels."""
        image = self._add("LoadImage", image=DEFAULT_IMAGE)
        if self.nodes.control_scale:
            return self._add(self.nodes.control_scale, image=image)
        if area <= LARGE_IMAGE or self.nodes.text_image_node:
            return image
        return self._add(
            "ImageScaleToTotalPixels",
            image=image,
            upscale_method="lanczos",
            megapixels=1.0,
        )

    def text_inputs(self) -> dict[str, Value]:
        """Return the inputs of the node that encodes a text with the images."""
        inputs: dict[str, Value] = {"vae": self.vae}
        has_numbers = self.nodes.text_image_node.endswith("Plus")
        for number, image in enumerate(self.images, 1):
            name = f"image{number}" if has_numbers else "image"
            inputs[name] = image
        return inputs

    def with_method(self, conditioning: Output) -> Output:
        """Return conditioning that says how the model is given the images."""
        method = self.nodes.reference_method
        if not method:
            return conditioning
        return self._add(
            "FluxKontextMultiReferenceLatentMethod",
            conditioning=conditioning,
            reference_latents_method=method,
        )

    def condition(self, conditioning: Output) -> Output:
        """Return conditioning to which the images are added."""
        for latents in self.latents:
            conditioning = self._add(
                "ReferenceLatent",
                conditioning=conditioning,
                latent=latents,
            )
        return conditioning

    def _add(self, kind: str, **inputs: Value) -> Output:
        """Add a node; return its first output."""
        node = self.graph.add(kind, inputs)
        return node.output()
