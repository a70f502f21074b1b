"""The keys that ComfyUI 0.33.0 loads from an adapter file of a full-size model (keys/README.md).

Written from ComfyUI's source (comfy/lora.py, comfy/weight_adapter/). It shares no line with the code that it checks.
"""

import functools
import gzip
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from helpers.project import FIXTURES

KEYS = FIXTURES / "keys"
ARCHITECTURES = sorted(path.name.removesuffix(".json.gz") for path in KEYS.glob("*.json.gz"))
FAMILIES = {
    "sdxl": "sdxl",
    "flux": "flux1",
    "flux_schnell": "flux1",
    "chroma": "chroma",
    "flux2": "flux2",
    "flux2_klein_4b": "flux2_klein",
    "flux2_klein_9b": "flux2_klein",
    "qwen_image": "qwen_image",
    "qwen_image_21": "qwen_image_21",
    "z_image": "z_image",
    "krea2": "krea2",
    "anima": "anima",
    "ernie_image": "ernie_image",
    "sd3": "sd3",
    "sd35_medium": "sd3",
    "sd35_large": "sd3",
    "wan21_1.3b": "wan",
    "wan21_14b": "wan",
    "wan22_5b": "wan",
    "wan21_i2v_14b": "wan_i2v",
    "ltx2": "ltx2",
    "hunyuan_video15": "hunyuan_video15",
}
"""Architecture -> family."""
# which spellings of diffusers' names ComfyUI has in its table, {n}: the name, {n_}: with _ for .
DIFFUSERS_FORMS = {
    "UNet2DConditionModel": ("lora_unet_{n_}", "lycoris_{n_}"),
    "SD3Transformer2DModel": (
        "transformer.{n}",
        "base_model.model.{n}",
        "lycoris_{n_}",
        "lora_transformer_{n_}",
    ),
    "QwenImageTransformer2DModel": ("{n}", "transformer.{n}", "lycoris_{n_}"),
    "QwenImage21Transformer2DModel": ("{n}", "transformer.{n}", "lycoris_{n_}"),
    "Krea2Transformer2DModel": ("{n}", "transformer.{n}", "lycoris_{n_}"),
    "ErnieImageTransformer2DModel": ("transformer.{n}",),
    "ZImageTransformer2DModel": ("{n}", "transformer.{n}", "diffusion_model.{n}", "lycoris_{n_}"),
    "WanTransformer3DModel": (),
    "LTX2VideoTransformer3DModel": (),
    "HunyuanVideo15Transformer3DModel": (),
    "CosmosTransformer3DModel": (),
}
FLUX_FORMS = ("{n}", "transformer.{n}", "lycoris_{n_}", "lora_transformer_{n_}")
LORA_SIDES = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora_B", "lora_A"),
    ("lora.up.weight", "lora.down.weight"),
)
SUFFIXES = (
    *(name for sides in LORA_SIDES for name in sides), "lora_mid.weight", "alpha", "dora_scale",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "oft_blocks", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "diff", "diff_b",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The weight, or its rows, that a spelling means in ComfyUI's model."""

    weight: str
    rows: tuple[int, int] | None = None
    swapped: bool = False

    @property
    def whole(self) -> bool:
        return self.rows is None and not self.swapped


@functools.cache
def key_map(architecture: str) -> dict[str, Any]:
    """Return the facts about an architecture in tests/keys."""
    return json.loads(gzip.decompress((KEYS / f"{architecture}.json.gz").read_bytes()))


def empty_denoiser(architecture: str) -> nn.Module:
    """Return the full-size diffusers model, without values."""
    there = key_map(architecture)
    with torch.device("meta"):
        return getattr(diffusers, there["class"])(**there["config"])


def place_of(there: Mapping[str, Any], module: str) -> Place:
    """Return the place of a module by its name in diffusers."""
    weight, *part = there["modules"][module]
    if part == ["swapped"]:
        return Place(weight, swapped=True)
    return Place(weight, (part[0], part[1]) if part else None)


@functools.cache
def spellings(architecture: str) -> dict[str, Place]:
    """Return ComfyUI's table: spelling -> place."""
    there = key_map(architecture)
    found = {}
    for weight in there["weights"]:
        name = weight.removesuffix(".weight")
        if name != weight:
            found |= {
                f"diffusion_model.{name}": Place(weight),
                f"lora_unet_{name.replace('.', '_')}": Place(weight),
            }
        else:
            found[f"diffusion_model.{name}"] = Place(weight)
    forms = DIFFUSERS_FORMS.get(there["class"], FLUX_FORMS)
    for module in there["modules"]:
        for form in forms:
            found.setdefault(
                form.format(n=module, n_=module.replace(".", "_")), place_of(there, module)
            )
    return found


def resolve(tensors: Mapping[str, Any], architecture: str) -> list[str]:
    """Return an error for every tensor of an adapter file that ComfyUI does not load.

    Also for a tensor that does not fit its weight, and for one that replaces another tensor."""
    table, shapes = spellings(architecture), key_map(architecture)["weights"]
    faults: list[str] = []
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    taken: dict[tuple[str, int], str] = {}
    for key, tensor in tensors.items():
        suffix = max((s for s in SUFFIXES if key.endswith(f".{s}")), key=len, default=None)
        spelling = key.removesuffix(f".{suffix}")
        if suffix is None or spelling not in table:
            faults.append(f"{key}: no such name")
        else:
            groups.setdefault(spelling, {})[suffix] = tuple(tensor.shape)
    for spelling, parts in groups.items():
        place = table[spelling]
        faults += [f"{spelling}: {fault}" for fault in faults_at(place, parts, shapes)]
        for row in row_range(place, shapes) if parts.keys() - {"diff_b"} else ():
            if row in taken:
                faults.append(f"{spelling}: replaces or adds to {taken[row]}")
            taken[row] = spelling
    return faults


def faults_at(
    place: Place, parts: dict[str, tuple[int, ...]], shapes: Mapping[str, list[int]]
) -> Iterable[str]:
    """Yield errors of tensors that do not fit the weight, its rows or its bias."""
    total, *rest = shapes[place.weight]
    yield from part_faults(parts, (place.rows[1] if place.rows else total, *rest))
    bias = shapes.get(place.weight.removesuffix("weight") + "bias")
    if "diff_b" in parts and not place.whole:
        yield "diff_b of a part is lost"
    elif "diff_b" in parts and (bias is None or tuple(bias) != parts["diff_b"]):
        yield f"diff_b {parts['diff_b']} for a bias of {bias}"
    if place.swapped and parts.keys() & {"oft_blocks", "dora_scale", "a1.weight"}:
        yield "applied to swapped rows, this is another function"


def row_range(place: Place, shapes: Mapping[str, list[int]]) -> Iterable[tuple[str, int]]:
    """Return one of 64 rows, to represent its neighbors."""
    first, count = place.rows or (0, shapes[place.weight][0])
    return ((place.weight, row) for row in range(first, first + count, 64))


def part_faults(parts: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> list[str]:
    """Return errors of tensors that do not fit a weight of that shape."""
    rows, columns = weight[0], math.prod(weight[1:])
    adapters = [
        made
        for made in (lora(parts), loha(parts), lokr(parts), oft(parts, columns), glora(parts))
        if made
    ]
    if "diff" in parts:
        adapters.append((parts["diff"][0], math.prod(parts["diff"][1:])))
    faults = [
        f"makes {made} for a weight of {weight}" for made in adapters if made != (rows, columns)
    ]
    if len(adapters) > 1:
        faults.append(f"{sorted(parts)}: several adapters; one replaces the others")
    if not adapters and parts.keys() - {"diff_b"}:
        faults.append(f"{sorted(parts)}: half an adapter")
    if "dora_scale" in parts and parts["dora_scale"] != (rows, *[1] * (len(weight) - 1)):
        faults.append(f"dora_scale {parts['dora_scale']} for a weight of {weight}")
    if "oft_blocks" in parts and "alpha" not in parts:
        faults.append("a rotation without alpha, which ComfyUI fails on")
    return faults


def product(up: tuple[int, ...] | None, down: tuple[int, ...] | None) -> tuple[int, int] | None:
    """Return the shape of up @ down as a matrix; (-1, -1) if they do not fit together."""
    if not up and not down:
        return None
    if not up or not down or up[1] != down[0]:
        return (-1, -1)
    return up[0], math.prod(down[1:])


def lora(parts: dict[str, tuple[int, ...]]) -> tuple[int, int] | None:
    return next(
        (made for up, down in LORA_SIDES if (made := product(parts.get(up), parts.get(down)))), None
    )


def loha(parts: dict[str, tuple[int, ...]]) -> tuple[int, int] | None:
    first, second = (product(parts.get(f"hada_w{i}_a"), parts.get(f"hada_w{i}_b")) for i in (1, 2))
    return first if first == second else (-1, -1)


def lokr(parts: dict[str, tuple[int, ...]]) -> tuple[int, int] | None:
    sides = [
        parts.get(f"lokr_w{i}") or product(parts.get(f"lokr_w{i}_a"), parts.get(f"lokr_w{i}_b"))
        for i in (1, 2)
    ]
    if not any(sides):
        return None
    if not all(sides):
        return (-1, -1)
    w1, w2 = ((side[0], math.prod(side[1:])) for side in sides if side)
    return w1[0] * w2[0], w1[1] * w2[1]


def oft(parts: dict[str, tuple[int, ...]], columns: int) -> tuple[int, int] | None:
    if "oft_blocks" not in parts:
        return None
    *_, blocks, side, other = parts["oft_blocks"]
    return (blocks * side, columns) if side == other else (-1, -1)


def glora(parts: dict[str, tuple[int, ...]]) -> tuple[int, int] | None:
    made = product(parts.get("b1.weight"), parts.get("b2.weight"))
    on_input = product(parts.get("a1.weight"), parts.get("a2.weight"))
    return made if made is None or (on_input and on_input[0] == on_input[1]) else (-1, -1)
