"""Z-Image omni beyond the tests of every family: segments, sizes and features of control images, batches of both kinds,
single files, ComfyUI's layout.
"""

import json
import shutil

import pytest
import torch
from diffusers import ZImageOmniPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from helpers import comfy_keys
from helpers.exported_keys import exported
from helpers.families.z_image_omni import EDIT, PLAIN
from helpers.family_cases import (
    PROMPTS,
    SIDE,
    collate,
    control_contents,
    family_of,
    folder_of,
    native_tensors,
    picture,
    rows_with_controls,
    values_of_file,
)
from helpers.memory_counts import assert_planned
from PIL import Image
from safetensors.torch import save_file

from adapter_files.spellings import layer_spellings
from common.errors import ModelError
from data.config import DataConfig
from data.precompute.controls import control_images, encode_controls
from lora_algos import ALGORITHMS
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.targets import select_layers
from models.config import ModelConfig
from models.controls import control_features, control_latents, without_controls
from models.detect import get_family
from models.families.z_image_omni_text import EDIT as EDIT_TEMPLATE
from models.families.z_image_omni_text import FRAME_TOKENS, TOKENS, segments
from models.families.z_image_omni_text import PLAIN as PLAIN_TEMPLATE
from models.released import configuration_folder, released_models
from training.memory.sample_shape import control_layout, planned_controls

CPU = torch.device("cpu")
CAPTIONS = [*PROMPTS, " owl" * 40, "{braces}"]


@pytest.fixture(scope="module")
def encoders():
    return family_of(PLAIN).load_encoders("text")


@pytest.mark.parametrize("num_controls", [0, 1, 2, 3])
def test_segments_are_those_of_the_pipeline(encoders, num_controls):
    family = family_of(PLAIN)
    with torch.no_grad():
        expected, _ = encoders.encode_prompt(
            [*CAPTIONS], CPU, do_classifier_free_guidance=False, num_condition_images=num_controls
        )
        cond = collate(family, family.encode_prompt(encoders, CAPTIONS))
    for sample, embeds in enumerate(expected):
        found = segments(cond, sample, num_controls)
        assert len(found) == len(embeds) == (num_controls + 2 if num_controls else 1)
        for segment, embed in zip(found, embeds, strict=True):
            torch.testing.assert_close(segment, embed, rtol=1e-5, atol=1e-6)


def test_both_templates_have_the_tokens_that_are_counted(encoders):
    family = family_of(PLAIN)
    for template in (PLAIN_TEMPLATE, EDIT_TEMPLATE):
        num_tokens = len(encoders.tokenizer(template.format("")).input_ids)
        assert num_tokens <= family.num_template_tokens()
    (row,) = family.encode_prompt(encoders, [" owl" * 2 * TOKENS])
    assert len(row["prompt_embeds"]) == len(row["edit_embeds"]) == TOKENS
    assert {name: len(row[name]) for name in FRAME_TOKENS} == FRAME_TOKENS


@pytest.mark.parametrize("size", [(512, 512), (1600, 900), (640, 1536), (1003, 1041), (4000, 500)])
def test_control_images_are_shrunk_and_cropped_as_in_the_pipeline(size):
    family = family_of(PLAIN)
    image = Image.new("RGB", size)
    if image.width * image.height > 1024 * 1024:
        image = Flux2ImageProcessor._resize_to_target_area(image, 1024 * 1024)
    step = family.pixel_step
    found = family.control_size(*size, None)
    assert (found.scaled_width, found.scaled_height) == image.size
    assert (found.width, found.height) == (image.width // step * step, image.height // step * step)
    (preview,) = family.control_options([Image.new("RGB", size)], 64, 64)["image"]
    assert preview.size == image.size, "a preview has the sizes of training"


def test_siglip_sees_the_image_before_its_crop(tmp_path):
    """And the VAE is given values rounded to bf16, whatever its own dtype is."""
    family = family_of(EDIT)
    media = family.load_encoders("media")
    assert media.siglip.dtype == torch.float32
    image = picture(70, 101)
    path = tmp_path / "control.png"
    image.save(path)
    (control,) = control_images(DataConfig(), family, [path.read_bytes()], flip=False)
    assert control.pixels.shape == (3, 64, 96)
    with torch.no_grad():
        encoded = encode_controls(family, media, [control], CPU)
        inputs = media.siglip_processor(images=[image], return_tensors="pt")
        rows, columns = inputs.spatial_shapes[0].tolist()
        states = media.siglip(**inputs).last_hidden_state[0, : rows * columns]
        cropped = media.image_processor.preprocess(image, height=64, width=96, resize_mode="crop")
        latents = media.vae.encode(cropped.bfloat16().float()).latent_dist.mode()
    assert rows != columns
    assert encoded["control_0_features"].equal(states.view(rows, columns, -1))
    torch.testing.assert_close(encoded["control_0"], latents[0], rtol=1e-4, atol=1e-5)


def test_a_mirrored_control_image_has_its_own_features():
    family = family_of(EDIT)
    media, contents = family.load_encoders("media"), control_contents(1)
    found = {}
    with torch.no_grad():
        for flip in (False, True):
            images = control_images(DataConfig(), family, contents, flip)
            found[flip] = encode_controls(family, media, images, CPU)["control_0_features"]
    assert not found[False].equal(found[True])


def test_batches_with_and_without_control_images_train_the_same_layers():
    """Otherwise processes with other batches would wait for each other's gradients."""
    family = family_of(EDIT)
    denoiser = family.load_denoiser(torch.float32)
    layers = select_layers(denoiser, ("all",), family.targets)
    adapted = attach(denoiser, dict.fromkeys(layers, LayerSpec(2, 2.0)), 0)
    parameters = adapted.named_parameters()
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    order: list[str] = []
    for name, block in family.blocks(denoiser).items():
        block.register_forward_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        cond = collate(family, rows_with_controls(family, ["owl"], EDIT.controls))
    orders = []
    for given in (cond, without_controls(cond)):
        order.clear()
        for parameter in parameters.values():
            parameter.grad = None
        noisy = torch.randn(1, 16, 8, 8)
        family.predict(denoiser, noisy, torch.tensor([500.0]), given).square().mean().backward()
        assert all(parameter.grad is not None for parameter in parameters.values())
        of_siglip = [p.grad for name, p in parameters.items() if "siglip" in name]
        assert of_siglip
        assert any(grad.any() for grad in of_siglip) == bool(control_latents(given))
        orders.append([*order])
    assert orders[0] == orders[1]


def test_the_presets_leave_out_what_comfyui_knows_by_its_own_names():
    family = family_of(PLAIN)
    denoiser = family.empty_denoiser()
    names = layer_spellings(family, denoiser)
    for preset, has_siglip in {"attention": False, "attention-mlp": False, "all": True}.items():
        layers = select_layers(denoiser, (preset,), family.targets)
        assert bool({*layers} & names.original_only) == has_siglip


@pytest.mark.parametrize(
    "algorithm",
    [name if name == "LoRA" else pytest.param(name, marks=pytest.mark.long) for name in ALGORITHMS],
)
def test_comfyui_knows_the_names_of_its_format(algorithm):
    """The blocks of SigLIP's branch are in comfy/ldm/lumina/model.py as those of the context, but their names in
    diffusers are not in ComfyUI's table. All others are Z-Image's."""
    with configuration_folder(released_models()["Z-Image-Omni-Base"]) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        denoiser = family.empty_denoiser()
    names = layer_spellings(family, denoiser)
    layers = dict.fromkeys(select_layers(denoiser, ("all",), family.targets), algorithm)
    tensors = exported(denoiser, names, layers, "comfyui")
    siglip = {key: tensor for key, tensor in tensors.items() if "siglip" in key}
    others = {key: tensor for key, tensor in tensors.items() if key not in siglip}
    assert comfy_keys.resolve(others, "z_image") == []
    blocks = {key: tensor for key, tensor in siglip.items() if "siglip_refiner" in key}
    assert comfy_keys.resolve(
        {key.replace("siglip_", "context_"): tensor for key, tensor in blocks.items()}, "z_image"
    ) == []  # fmt: skip
    assert all(key.startswith("diffusion_model.siglip_") and ".to_" not in key for key in siglip)
    embedder = [key for key in siglip if key not in blocks]
    assert embedder
    assert all(key.startswith("diffusion_model.siglip_embedder.1.") for key in embedder)


def test_a_file_of_comfyuis_names_is_the_same_model(tmp_path):
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(PLAIN, "model.diffusion_model.")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    values_of_file(PLAIN, path)
    siglip_names = [name for name in tensors if "siglip" in name]
    save_file({n: t.clone() for n, t in tensors.items() if n not in siglip_names}, path)
    with pytest.raises(ModelError, match="is z_image, not z_image_omni"):
        get_family(ModelConfig(path=path, family="z_image_omni", config=str(folder_of(PLAIN))))


def test_a_model_without_siglip_features_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of(PLAIN), folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "siglip_feat_dim": None}))
    with pytest.raises(ModelError, match="takes no SigLIP features"):
        get_family(ModelConfig(path=str(folder)))


class TestComfyui:
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_sample_with_control_images_comes_back(self, count):
        family = family_of(EDIT)
        with torch.no_grad():
            (row,) = rows_with_controls(family, ["owl"], count)
        cond, extras = family.comfy.write(row)
        assert cond.equal(row["edit_embeds"][None])
        # the order of ComfyUI's node TextEncodeZImageOmni
        between = [row["between_embeds"]] * (count - 1)
        expected = [row["before_embeds"], *between, row["after_embeds"]]
        texts = extras["reference_latents_text_embeds"]
        assert len(texts) == len(expected) == count + 1
        assert all(text.equal(embeds[None]) for text, embeds in zip(texts, expected, strict=True))
        back = family.comfy.read(cond, extras)
        assert back.keys() == row.keys()
        assert all(back[name].equal(tensor) for name, tensor in row.items())

    def test_what_comfyui_encodes_is_trained_without_siglip(self):
        """Its SigLIP features are of another type, which is not read."""
        family = family_of(EDIT)
        with torch.no_grad():
            (row,) = rows_with_controls(family, ["owl"], 2)
            cond, extras = family.comfy.write(row)
            comfys = ("pooled_output", "reference_latents", "reference_latents_text_embeds")
            extras = {name: extras[name] for name in comfys}
            found = collate(family, [family.comfy.read(cond, extras)])
            assert len(control_latents(found)) == 2
            assert control_features(found) == []
            denoiser = family.load_denoiser(torch.float32)
            noisy = torch.randn(1, 16, 8, 8)
            predicted = family.predict(denoiser, noisy, torch.tensor([500.0]), found)
            full = family.predict(denoiser, noisy, torch.tensor([500.0]), collate(family, [row]))
        assert predicted.shape == full.shape == noisy.shape
        assert not torch.allclose(predicted, full, atol=1e-4)

    def test_control_images_need_their_texts(self):
        family = family_of(EDIT)
        extras = {"reference_latents": [torch.zeros(1, 16, 8, 8)]}
        with pytest.raises(ModelError, match="without reference_latents_text_embeds of 2 texts"):
            family.comfy.read(torch.zeros(1, 4, family.cond_width), extras)


def test_the_pipeline_has_the_defects_that_are_worked_around():
    """If this fails, diffusers mended it, and models/families/z_image_omni.py can be simpler."""
    pipeline = ZImageOmniPipeline.from_pretrained(folder_of(EDIT), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="BFloat16"):
        pipeline.prepare_image_latents([torch.zeros(1, 3, 64, 64)], 1, CPU, torch.float32)


def test_samples_with_other_numbers_of_control_images_train_in_one_run(
    options, run_here, images, capsys
):
    for name in ("cat_control", "dog_control", "dog_control_1"):
        picture(64, 80).save(images / f"{name}.png")
    mine = [*options, f"--model.path={folder_of(EDIT)}", f"--data.resolution={SIDE}", "--adapter.targets=all",
            "--batch_size=1", "--steps=6", "--no_preview"]  # fmt: skip
    assert run_here(mine) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "2 with no control image" in out
    assert "1 with 1 control image" in out
    assert "1 with 2 control images" in out


@pytest.mark.long
def test_a_step_with_control_images_takes_the_planned_memory(options, run_here, images, controls):
    for path in images.glob("*.txt"):
        path.write_text("a cat and a dog " * 200)
    small = [f"--data.resolution={SIDE}", "--no_bucket_mode", f"--data.control_pixels={64 * 64}"]
    gray = str(controls[0])
    more = [f"--model.path={folder_of(EDIT)}", "--data.control_paths", gray, gray]
    assert_planned(run_here, [*options, *small, *more, "--gradient_checkpointing"], tolerance=0.04)


def test_the_plan_counts_images_and_not_their_features():
    data = DataConfig(control_paths=("a", "b"))
    family = family_of(EDIT)
    assert planned_controls(data, family) == 2
    assert set(control_layout(data, family)) == {
        "control_0",
        "control_0_features",
        "control_1",
        "control_1_features",
    }
