"""How the layers of a model are called in adapter files, and which tensor of a layer a key means."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from models.base import ModelFamily


@dataclass(frozen=True)
class Names:
    """The names of one model's layers, beside diffusers' own, by which adapters know them."""

    native: dict[str, str] = field(default_factory=dict)
    """diffusers' name -> name in the original model, which is ComfyUI's, without
    `diffusion_model.`."""
    component: str = "unet"
    """diffusers' name of the denoiser in a pipeline."""
    kohya_is_native: bool = False
    """Whether kohya's names are made of the native ones."""
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Layer -> (first, count): the rows that it is of a native weight that is fused of several
    layers."""
    swapped: frozenset[str] = frozenset()
    """Layers whose halves of rows stand the other way round in the native weight."""
    by_diffusers: str = ""
    """What ComfyUI wants before diffusers' name of a layer, by which alone it knows the parts of a fused weight; empty:
    it knows none."""
    alphas: bool = True
    """Whether LoRAs under ComfyUI's names say their alpha, or have it in their second factor."""
    native_only: frozenset[str] = frozenset()
    """Layers that ComfyUI does not know by diffusers' name."""
    text: dict[str, str] = field(default_factory=dict)
    """Layers of text encoders, which begin with the encoder's name in a pipeline -> the name that all but diffusers
    call them by, `lora_te_text_model_encoder_layers_0_mlp_fc1`."""

    def kohya(self, layer: str) -> str:
        """`down_blocks.0.attentions.0.proj_in` -> `lora_unet_down_blocks_0_attentions_0_proj_in`."""
        if layer in self.text:
            return self.text[layer]
        name = self.native[layer] if self.kohya_is_native else layer
        return "lora_unet_" + name.replace(".", "_")

    def comfyui(self, layer: str) -> str:
        return self.text.get(layer) or f"diffusion_model.{self.native[layer]}"

    def diffusers(self, layer: str) -> str:
        return layer if layer in self.text else f"{self.component}.{layer}"

    def peft(self, layer: str) -> str:
        return f"base_model.model.{layer}"

    @cached_property
    def fused(self) -> dict[str, list[str]]:
        """Native name -> the layers that the weight is fused of, in the order of its rows."""
        found: dict[str, list[str]] = {}
        for layer in sorted(self.rows, key=lambda layer: self.rows[layer]):
            found.setdefault(self.native[layer], []).append(layer)
        return found

    def siblings(self, layer: str) -> list[str]:
        """The layers of which the native weight is fused, the layer itself among them; it alone if
        it is not."""
        return self.fused[self.native[layer]] if layer in self.rows else [layer]

    def native_rows(self, layer: str) -> int:
        """How many rows the fused weight has that the layer is part of."""
        first, count = self.rows[self.siblings(layer)[-1]]
        return first + count

    def groups(self, layers: Iterable[str]) -> list[list[str]]:
        """`layers`, those of one fused weight together."""
        found: dict[str, list[str]] = {}
        for layer in layers:
            found.setdefault(self.siblings(layer)[0], []).append(layer)
        return list(found.values())

    def spellings(self, layer: str) -> list[str]:
        """Every way in which some program writes the layer."""
        if (
            layer in self.text
        ):  # transformers puts `text_model` before most names in some versions, and in some not
            encoder, _, inside = layer.partition(".")
            inside = inside.removeprefix("text_model.")
            return [self.text[layer], f"{encoder}.{inside}", f"{encoder}.text_model.{inside}"]
        flat = layer.replace(".", "_")
        return [
            layer,
            f"lora_unet_{flat}",
            f"lycoris_{flat}",
            f"lora_transformer_{flat}",
            f"lycoris_unet_{flat}",
            *(
                f"{p}.{layer}"
                for p in ("unet", "transformer", "diffusion_model", "base_model.model")
            ),
            *(f"{p}.base_model.model.{layer}" for p in ("unet", "transformer")),
            *self.native_spellings(layer),
        ]

    def native_spellings(self, layer: str) -> list[str]:
        """Every way in which some program writes the weight in the original model that the layer is
        part of."""
        if layer not in self.native:
            return []
        native = self.native[layer]
        flat = native.replace(".", "_")
        return [
            f"diffusion_model.{native}",
            f"model.diffusion_model.{native}",
            f"lora_unet_{flat}",
            f"lycoris_{flat}",
        ]

    def is_native(self, key: str, layer: str) -> bool:
        """Whether the tensor is of the original model's weight, and that is not simply the layer's
        own."""
        differs = layer in self.rows or layer in self.swapped
        return differs and split_key(key)[0] in self.native_spellings(layer)

    def layer_of(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """Spelling -> the layers that it means, of all of `layers`."""
        found: dict[str, list[str]] = {}
        for layer in layers:
            for spelling in dict.fromkeys(self.spellings(layer)):
                found.setdefault(spelling, []).append(layer)
        return found


# What a key ends with -> the tensor's name here. Names that several programs use stand there as
# they are.
SUFFIXES = {
    **{
        f".{own}": own
        for own in (
            "lora_down.weight",
            "lora_up.weight",
            "lora_mid.weight",
            "alpha",
            "dora_scale",
            "lora_magnitude_vector",
            "hada_w1_a",
            "hada_w1_b",
            "hada_w2_a",
            "hada_w2_b",
            "hada_t1",
            "hada_t2",
            "lokr_w1",
            "lokr_w1_a",
            "lokr_w1_b",
            "lokr_w2",
            "lokr_w2_a",
            "lokr_w2_b",
            "lokr_t2",
            "oft_blocks",
            "rescale",
            "a1.weight",
            "a2.weight",
            "b1.weight",
            "b2.weight",
            "bm.weight",
            "diff",
            "diff_b",
            "oft_R.weight",
            "set_weight",
            "reshape_weight",
            "initial_up",
            "initial_down",
        )
    },
    **{
        f".{name}": own
        for own, sides in (
            (
                "lora_down.weight",
                (
                    "lora_A.weight",
                    "lora_A.default.weight",
                    "lora_A",
                    "lora.down.weight",
                    "lora_linear_layer.down.weight",
                ),
            ),
            (
                "lora_up.weight",
                (
                    "lora_B.weight",
                    "lora_B.default.weight",
                    "lora_B",
                    "lora.up.weight",
                    "lora_linear_layer.up.weight",
                ),
            ),
            (
                "lora_magnitude_vector",
                (
                    "lora_magnitude_vector.weight",
                    "lora_magnitude_vector.default.weight",
                    "lora_magnitude_vector.default",
                ),
            ),
            ("diff", ("w_norm",)),
            ("diff_b", ("b_norm",)),
        )
        for name in sides
    },
    "_lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
}
LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)


def split_key(key: str) -> tuple[str, str]:
    """A file's key as the layer's spelling and the tensor's name here; the name is empty if no
    program writes such."""
    for suffix in LONGEST_FIRST:
        if key.endswith(suffix):
            return re.sub(
                r"\.processor\.(to_out)$|\.processor\.", processor, key[: -len(suffix)]
            ), SUFFIXES[suffix]
    return key, ""


def group_keys(
    shapes: Mapping[str, tuple[int, ...]], layer_of: Mapping[str, list[str]]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """A file's keys as layer -> tensor's name here -> key, and a line for each key that belongs to
    no layer."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key, shape in shapes.items():
        spelling, name = split_key(key)
        layers = layer_of.get(spelling, []) if name else []
        taken = [found[layer][name] for layer in layers if name in found.get(layer, ())]
        if taken:
            unknown.append(f"{key} {shape}: the same tensor as {taken[0]}")
        elif layers:
            for layer in layers:
                found.setdefault(layer, {})[name] = key
        else:
            unknown.append(
                f"{key} {shape}: {'no such layer in the model' if name else 'no tensor of an adapter'}"
            )
    return found, unknown


def processor(match: re.Match) -> str:
    """Old diffusers files name `attn1.processor.to_q` and `attn1.processor.to_out`."""
    return ".to_out.0" if match[1] else "."


# (pattern that keys of a file show, what it is of): to say what an unmatched file looks like. The
# first that fits counts.
LOOKS = (
    (r"single_transformer_blocks|double_blocks|single_blocks", "FLUX"),
    (r"joint_blocks|joint_attn", "Stable Diffusion 3"),
    (
        r"(attentions|blocks)[._]\d+[._](\d+[._])?transformer_blocks[._][2-9]|add_embedding|label_emb|lora_te2_",
        "Stable Diffusion XL",
    ),
    (r"add_q_proj|img_mlp|txt_mlp", "a multimodal transformer (SD3, FLUX, Qwen-Image)"),
    (r"blocks[._]\d+[._](self_attn|cross_attn)|condition_embedder", "Wan"),
    (r"down_blocks|up_blocks|input_blocks|output_blocks", "a UNet (Stable Diffusion 1, 2 or XL)"),
    (r"lora_te|text_encoder|text_model", "a text encoder"),
)


def looks_like(keys: Iterable[str]) -> str:
    """What model the keys of a file seem to belong to; empty if they say nothing."""
    text = "\n".join(keys)
    return next((what for pattern, what in LOOKS if re.search(pattern, text)), "")


def file_names(family: ModelFamily, denoiser: nn.Module) -> Names:
    """`denoiser` may be without values."""
    natives = family.layer_names.original(denoiser)
    return Names(
        {layer: native.name for layer, native in natives.items()},
        family.denoiser_component.removesuffix(
            "_2"
        ),  # each of two denoisers has a file of its own, in which it is the one
        family.layer_names.kohya_uses_original_names,
        rows={layer: native.row_slice for layer, native in natives.items() if native.row_slice},
        swapped=frozenset(layer for layer, native in natives.items() if native.swapped_halves),
        by_diffusers=family.layer_names.diffusers_prefix,
        alphas=family.layer_names.writes_alpha,
        native_only=frozenset(
            layer for layer, native in natives.items() if not native.known_by_diffusers_name
        ),
        text=family.layer_names.text_encoders(denoiser),
    )
