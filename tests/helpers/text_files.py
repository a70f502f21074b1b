"""Text encoders of the test models in files of their own, as ComfyUI's folder text_encoders has them."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.precompute.controls import control_pictures
from helpers.family_cases import PROMPTS, Case, control_contents, folder_of
from models.base import ModelFamily
from models.config import ModelConfig
from models.detect import get_family
from models.encoder_placement import keep_first_layers

LEFT_OUT = (
    "lm_head.",
    "encoder.embed_tokens.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "vision_tower.",
    "multi_modal_projector.",
)


def comfy_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """An encoder under the names in ComfyUI's files, with what else these have."""
    state = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith(LEFT_OUT)
    }
    state = {name.replace("model.visual.", "visual."): tensor for name, tensor in state.items()}
    state = {
        name.replace("model.language_model.", "model."): tensor for name, tensor in state.items()
    }
    kind = type(encoder).__name__
    if kind == "CLIPTextModel":
        state = {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in state.items()
        }
    if kind == "Mistral3Model":
        state = {name.replace("language_model.", "model."): t for name, t in state.items()}
    if kind == "Qwen3Model":
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    more = {"logit_scale": torch.tensor(4.6), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    return {**{name: tensor.contiguous() for name, tensor in state.items()}, **more}


def encoders_of(case: Case) -> dict[str, nn.Module]:
    """The text encoders with all their layers, as files have them; without heads and vision towers."""
    pipeline = get_family(ModelConfig(path=str(folder_of(case)), **case.model)).pipeline(None)
    encoders = {}
    for name, part in pipeline.components.items():
        if not name.startswith("text_encoder") or part is None:
            continue
        if case.family.startswith("flux2"):
            keep_first_layers(part, last_state=1000)
        encoders[name] = part
    return encoders


def text_files(case: Case, folder: Path) -> dict[str, str]:
    """A file of each of the case's text encoders."""
    paths = {name: str(folder / f"{name}.safetensors") for name in encoders_of(case)}
    for name, encoder in encoders_of(case).items():
        save_file(comfy_tensors(encoder), paths[name])
    return paths


def bare(case: Case, folder: Path, pattern: str) -> Path:
    """A copy of the case's folder without weights in the parts of that pattern."""
    copy = Path(shutil.copytree(folder_of(case), folder))
    for file in copy.glob(f"{pattern}/*.safetensors"):
        file.unlink()
    return copy


def rows(family: ModelFamily) -> list[dict[str, Tensor]]:
    encoders = family.load_encoders("text")
    with torch.no_grad():
        if not family.controls.is_seen_by_text_encoder:
            return family.encode_prompt(encoders, [*PROMPTS])
        pictures = control_pictures(control_contents(1), "white")
        return [family.encode_with_controls(encoders, prompt, pictures) for prompt in PROMPTS]


def assert_same_rows(family: ModelFamily, expected: ModelFamily) -> None:
    for found, wanted in zip(rows(family), rows(expected), strict=True):
        assert found.keys() == wanted.keys()
        assert all(found[name].equal(wanted[name]) for name in wanted)
