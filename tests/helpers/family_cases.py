"""A case per family: a tiny pipeline of the real classes, and one denoising call of diffusers' own pipeline to compare
with.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.precompute.controls import control_images, control_pictures, encode_controls
from data.store.keys import key_of
from data.store.store import Store
from helpers.families.tiny_qwen import image_text_processor
from models import FAMILIES
from models.base import ModelFamily
from models.config import MODULAR_INDEX, ModelConfig, index_path
from models.detect import get_family
from models.layer_names.names import OriginalLayer

PROMPTS = ["a photo of a smiling red cat", "owl"]
SIDE = 32


@dataclass(frozen=True, eq=False)
class Case:
    """A family, how its tiny pipeline is made, and how its pipeline is called so that it takes the conditional
    prediction as it is."""

    family: str
    make: Callable[[], Any]
    guidance: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call by which there is no classifier-free guidance."""
    unpack: Callable[[Any, Tensor, int, int], Tensor] | None = None
    """(pipeline, latents as its scheduler sees them, height, width of the image) -> (B, C, [F,] h, w)."""
    comfy: Callable[[Any, str], tuple[Tensor, dict[str, Any]]] | None = None
    """(pipeline with the text encoders, caption) -> what ComfyUI has for it: cond (1, L, D), and its dict."""
    stored: Callable[[Any, Tensor], Tensor] | None = None
    """(pipeline, latents that its VAE decodes) -> the same as raw latents, where those are not the VAE's own."""
    repair: Callable[[Any], None] | None = None
    """Mends what is wrong in diffusers' pipeline."""
    bare: Callable[[str], str] = str
    """diffusers' name of a parameter or buffer that is of no layer -> its name in the original model."""
    beside: Callable[["Case"], dict[str, Tensor]] | None = None
    """Tensors of another component, which single files have next to the denoiser's."""
    name: str = ""
    """Where a family has several cases."""
    options: tuple[str, ...] = ()
    """Of the command line, for a training of this case."""
    model: dict[str, Any] = field(default_factory=dict)
    """Options of the model section, besides its path."""
    step: int = 0
    """Which step of the pipeline calls the denoiser that the family trains."""
    first_frame: bool = False
    """Whether the pipeline is given an image, which is the first frame."""
    has_mask: bool = False
    """Whether the pipeline paints the part of an image that a mask shows."""
    controls: int = 0
    """How many control images the pipeline is given."""
    alone: bool = False
    """Whether the pipeline is given one prompt at a time, because prompts of a batch change each other's images."""

    def __str__(self) -> str:
        return self.name or self.family


@lru_cache
def cases() -> list[Case]:
    """One or several cases of each family: tests/helpers/families/<name>.py has CASE, or CASES."""
    found: list[Case] = []
    for family in FAMILIES:
        if family != "sd15":  # its case is the embedded model, in tests of its own
            module = import_module(f"helpers.families.{family}")
            found += getattr(module, "CASES", None) or [module.CASE]
    return found


@lru_cache
def folder_of(case: Case) -> Path:
    """The tiny pipeline as a folder of diffusers, to be read only."""
    folder = Path(mkdtemp(prefix=f"train-lora-{case}-"))
    torch.manual_seed(0)
    pipeline = case.make()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            livelier(part)
    pipeline.save_pretrained(str(folder))  # modular pipelines take no Path
    return folder


def livelier(module: torch.nn.Module) -> None:
    """Random values where initial ones are all zero, so that every input counts in the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)


def family_of(case: Case) -> ModelFamily:
    return get_family(ModelConfig(path=str(folder_of(case)), **case.model))


@dataclass
class Call:
    """What one step of a pipeline showed, in the layout of latents: the noisy latents, the timestep and the prediction
    that its scheduler was given; the last latents, and those that it decoded, raw as they are stored."""

    noisy: Tensor
    timestep: Tensor
    prediction: Tensor
    final: Tensor
    decoded: Tensor


def picture(height: int, width: int) -> Image.Image:
    """Any image."""
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1))
    return Image.fromarray((pixels * 255).to(torch.uint8).numpy())


def mask(height: int, width: int) -> Tensor:
    """A mask (H, W) whose edges are inside of latents."""
    values = torch.zeros(height, width)
    values[height // 4 + 1 : height // 2 + 2, 3 : width // 2 + 1] = 1
    return values


def to_pil(values: Tensor) -> Image.Image:
    return Image.fromarray((values * 255).to(torch.uint8).numpy())


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def control_contents(count: int) -> list[bytes]:
    """The files of so many control images, of different sizes."""
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        picture(64 + 32 * number, 96).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def rows_with_controls(
    family: ModelFamily, captions: list[str], count: int
) -> list[dict[str, Tensor]]:
    """Conditioning of captions, all with the same control images."""
    contents, config = control_contents(count), DataConfig()
    encoders = family.load_encoders("text")
    if not count:
        return family.encode_prompt(encoders, captions)
    if family.controls.is_seen_by_text_encoder:
        pictures = control_pictures(contents, config.background)
        rows = [family.encode_with_controls(encoders, caption, pictures) for caption in captions]
    else:
        rows = family.encode_prompt(encoders, captions)
    images = control_images(config, family, contents, flip=False)
    latents = encode_controls(family, family.load_encoders("media"), images, torch.device("cpu"))
    return [{**row, **latents} for row in rows]


def seen_in(case: Case, family: ModelFamily, shape: tuple[int, int]) -> dict[str, Tensor]:
    """What samples for PROMPTS tell the denoiser of themselves: videos that begin with the picture, or the picture
    with a mask."""
    count, first = len(PROMPTS), pixels_of(picture(*shape))
    if not case.has_mask and not case.first_frame:
        return {}
    encoders = family.load_encoders("media")
    if case.has_mask:
        pixels, masks = first.expand(count, -1, -1, -1), mask(*shape).expand(count, -1, -1)
        return family.encode_sample_conditioning(encoders, pixels, masks)
    video = torch.rand(count, 3, case.guidance["num_frames"], *shape) * 2 - 1
    video[:, :, 0] = first
    return family.encode_sample_conditioning(encoders, video)


def diffusers_pipeline(case: Case) -> Any:
    """diffusers' own pipeline of a case, as diffusers loads it."""
    import diffusers

    folder = folder_of(case)
    if index_path(folder).name == MODULAR_INDEX:
        pipeline = diffusers.ModularPipeline.from_pretrained(str(folder))
        pipeline.load_components(dtype=torch.float32)
        return pipeline
    index = diffusers.DiffusionPipeline.load_config(folder)
    absent = {name: None for name, part in index.items() if part == [None, None]}
    if "processor" in index and "processor" not in absent:
        absent["processor"] = image_text_processor(index["processor"][1])
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
        folder, dtype=torch.float32, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(case: Case, height: int = SIDE, width: int = SIDE) -> Call:
    """One of two steps of diffusers' own pipeline on PROMPTS."""
    pipeline = diffusers_pipeline(case)
    if case.repair:
        case.repair(pipeline)
    steps: list[tuple[Tensor, Any, Tensor, Tensor]] = []
    scheduler, decode = pipeline.scheduler, pipeline.vae.decode
    decoded: list[Tensor] = []

    class WatchedScheduler(type(scheduler)):
        def step(
            self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            result = super().step(model_output, timestep, sample, *args, **kwargs)
            if self is scheduler:  # not its copy, by which a pipeline denoises audio
                steps.append((sample.clone(), timestep, model_output.clone(), result[0].clone()))
            return result

    def watched_decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(latents.clone())
        return decode(latents, *args, **kwargs)

    scheduler.__class__, pipeline.vae.decode = WatchedScheduler, watched_decode
    given = {"image": picture(height, width)} if case.first_frame or case.has_mask else {}
    if case.has_mask:
        given["mask_image"] = to_pil(mask(height, width))
    # pipelines that edit take one prompt at a time
    is_alone = case.alone or case.controls
    calls = [[prompt] for prompt in PROMPTS] if is_alone else [PROMPTS]
    shown: list[tuple[Tensor, ...]] = []
    for prompts in calls:
        if case.controls:
            given = call_options(case, height, width)
        steps.clear()
        decoded.clear()
        pipeline(
            prompt=prompts[0] if is_alone else [*prompts], **given, height=height, width=width,
            num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(len(shown)), **case.guidance,
        )  # fmt: skip
        noisy, timestep, prediction, _ = steps[case.step]
        unpack = case.unpack or (lambda _, latents, *__: latents)
        noisy, prediction, final = (
            unpack(pipeline, t, height, width) for t in (noisy, prediction, steps[-1][3])
        )
        raw = case.stored(pipeline, decoded[0]) if case.stored else decoded[0]
        shown.append((noisy, prediction, final, raw))
    noisy, prediction, final, raw = (torch.cat(tensors) for tensors in zip(*shown, strict=True))
    return Call(noisy, torch.as_tensor(timestep), prediction, final, raw)


def call_options(case: Case, height: int, width: int) -> dict[str, Any]:
    """What the pipeline of a model that edits is given besides the prompt."""
    pictures = control_pictures(control_contents(case.controls), "white")
    return family_of(case).control_options(pictures, width, height)


def collate(family: ModelFamily, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditioning of several captions as a batch has it, padded by the code that reads stores."""
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.write((key_of(str(i)), row) for i, row in enumerate(rows))
        store.reload()
        return store.read_batch(
            store.find(np.array([key_of(str(i)) for i in range(len(rows))])).tolist(),
            family.variable_length,
        )


def values_of_file(case: Case, path: str) -> dict[str, Tensor]:
    """The weights of a single file, which must be those of the case's folder."""
    expected = family_of(case).load_denoiser(torch.float32).state_dict()
    family = get_family(ModelConfig(path=path, config=str(folder_of(case))))
    assert family.name == case.family
    values = family.load_denoiser(None).state_dict()
    assert values.keys() == expected.keys()
    for name, tensor in values.items():
        assert tensor.equal(expected[name]), name
    return values


def native_tensors(case: Case, prefix: str = "", norm: str = "weight") -> dict[str, Tensor]:
    """The denoiser as the original model's code has it: fused, with shift before scale; `norm`: what it calls the
    weights of norms."""
    family = family_of(case)
    denoiser = family.load_denoiser(torch.float32)
    natives, parts = family.layer_names.original(denoiser), {}
    for name, tensor in denoiser.state_dict().items():
        layer, _, kind = name.rpartition(".")
        native = natives.get(layer, OriginalLayer(""))
        tensor = torch.cat([*tensor.chunk(2)][::-1]) if native.swapped_halves else tensor
        key = (
            f"{native.name}.{norm if 'norm' in native.name and kind == 'weight' else kind}"
            if layer in natives
            else case.bare(name)
        )
        parts.setdefault(prefix + key, []).append(
            (native.row_slice[0] if native.row_slice else 0, tensor)
        )
    if case.beside:
        for name, tensor in case.beside(case).items():
            parts[prefix + name] = [(0, tensor)]
    in_order = {name: sorted(found, key=lambda part: part[0]) for name, found in parts.items()}
    return {name: torch.cat([tensor for _, tensor in found]) for name, found in in_order.items()}
