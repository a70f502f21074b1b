"""What Qwen-Image and Z-Image do beyond what every family does: lengths of captions, templates, shift, single files."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from helpers.device_reads import device_reads
from helpers.families import qwen_image as family_qwen_image
from helpers.families import z_image as family_z_image
from helpers.family_cases import (
    PROMPTS,
    Case,
    collate,
    family_of,
    folder_of,
    native_tensors,
    run_pipeline,
)
from helpers.predictions import noise, prediction, rows_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig

QWEN, Z_IMAGE = family_qwen_image.CASE, family_z_image.CASE
ALL = pytest.mark.parametrize("case", [QWEN, Z_IMAGE], ids=str)
LENGTHS = (5, 31, 32, 33, 70)  # Z-Image fills up captions to multiples of 32 tokens


def cut(case: Case, lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """The first tokens of a long caption, of different ones for each length."""
    rows = rows_of(case, [f"{PROMPTS[0]} {'owl ' * 80}{i}" for i in range(len(lengths))])
    return [
        {"prompt_embeds": row["prompt_embeds"][:n] * (i + 1)}
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
    ]


@ALL
def test_texts_of_any_lengths_in_a_batch_are_seen_as_alone(case):
    rows, noisy = cut(case, LENGTHS), noise(len(LENGTHS))
    together = prediction(case, rows, noisy)
    alone = torch.cat([prediction(case, [row], noisy[i : i + 1]) for i, row in enumerate(rows)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(40, 40), (33, 70)], ids=["alike", "different"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL
def test_no_value_is_read_and_gradients_are_finite(case, dtype, lengths):
    family = family_of(case)
    denoiser = family.load_denoiser(dtype)
    cond = collate(family, cut(case, lengths))
    cond["prompt_embeds"] = cond["prompt_embeds"].to(dtype)
    latents = noise().to(dtype)
    family.normalize(latents)
    with device_reads() as reads:
        found = family.predict(
            denoiser, family.normalize(latents), torch.tensor([3.0, 997.0]), cond
        )
        found.float().square().mean().backward()
    assert not reads.reads
    gradients = [
        parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None
    ]
    assert len(gradients) > 50
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_tiny_tokenizer_has_as_many_tokens_before_the_caption_as_the_pipeline_cuts_off():
    encoders = family_of(QWEN).load_encoders("text")
    before = encoders.prompt_template_encode.partition("{}")[0]
    assert (
        len(encoders.tokenizer(before).input_ids) == encoders.prompt_template_encode_start_idx == 34
    )


@ALL
def test_captions_are_told_to_be_cut_where_they_are(case):
    family = family_of(case)
    limit = family.count_tokens([""])[1]
    captions = [" owl" * count for count in (limit - 1, limit, limit + 1)]
    assert family.count_tokens(captions)[0] == [limit - 1, limit, limit + 1]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(case, captions))
    assert [len(less), len(fits), len(over)] == [
        family.max_tokens - 1,
        family.max_tokens,
        family.max_tokens,
    ]
    assert torch.dist(fits[-1], less[-1]) < 0.2 * torch.dist(fits[-1], over[-1]), (
        "the last mark is seen, or cut off"
    )


@ALL
def test_comfyuis_padding_is_left_out_by_its_mask(case):
    family, row = family_of(case), rows_of(case)[0]
    cond, extras = family.comfy.write(row)
    count = cond.shape[1]
    longer = torch.cat([cond, torch.randn(1, 3, cond.shape[2])], 1)
    mask = torch.arange(count + 3)[None] < count
    back = family.comfy.read(longer, {**extras, "attention_mask": mask})
    assert back["prompt_embeds"].equal(row["prompt_embeds"])
    for wrong in (~mask, torch.zeros_like(mask), mask[:, 1:]):
        with pytest.raises(ModelError, match=r"attention_mask (with gaps|of shape)"):
            family.comfy.read(longer, {**extras, "attention_mask": wrong})


@pytest.mark.parametrize("side", [512, 1024, 1536])
@ALL
def test_noise_levels_are_shifted_as_the_pipeline_shifts_them(case, side):
    family, sigmas = family_of(case), torch.linspace(0.05, 0.95, 7)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        folder_of(case), subfolder="scheduler"
    )
    config = scheduler.config
    mu = calculate_shift(
        (side // 16) ** 2,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.register_to_config(
        shift_terminal=None
    )  # this moves the steps of a drawing, and no level of training
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    levels = family.process(ObjectiveConfig()).levels(
        sigmas, family.limits.num_tokens((1, 16, side // 8, side // 8))
    )
    torch.testing.assert_close(levels.timestep, scheduler.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("case", "name"),
    [(QWEN, "true_cfg_scale"), (Z_IMAGE, "guidance_scale")],
    ids=["qwen", "z_image"],
)
def test_previews_are_guided(case, name):
    options = family_of(case).preview_options(4.0)
    assert options[name] == 4.0
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(PROMPTS)
    guided, plain = (
        run_pipeline(replace(case, guidance=given)) for given in (options, {**options, name: 0.0})
    )
    assert guided.noisy.equal(plain.noisy)
    assert not torch.allclose(guided.prediction, plain.prediction, atol=1e-3)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@ALL
def test_single_files_of_the_original_names_are_the_same_model(case, prefix, tmp_path):
    path = str(tmp_path / "model.safetensors")
    wanted = family_of(case).load_denoiser(torch.float32).state_dict()
    bare = {f"{prefix}{name}": tensor for name, tensor in wanted.items() if "." not in name}
    native = native_tensors(case, prefix, "weight")
    assert len(native) < len(wanted) or case is QWEN, "q, k and v are one weight"
    save_file(native | bare, path)
    family = get_family(ModelConfig(path=path, config=str(folder_of(case))))
    assert family.name == case.family
    found = family.load_denoiser(None)
    assert found.state_dict().keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.state_dict().items())
    with torch.no_grad():
        cond, latents = collate(family, rows_of(case)), noise()
        together = family.predict(found, latents, torch.full((2,), 700.0), cond)
    torch.testing.assert_close(together, prediction(case, rows_of(case), latents))


def test_a_run_in_which_some_adapters_are_frozen_goes_on_as_if_it_had_not_stopped(
    options, run_here, tmp_path
):
    """What the last block makes of the text goes nowhere: no optimizer has a state for it."""
    mine = [
        option
        for option in options
        if not option.startswith(("--model.path", "--adapter.targets", "--output_dir"))
    ]
    mine += [
        f"--model.path={folder_of(QWEN)}",
        "--adapter.targets=all",
        "--data.resolution=32",
        "--checkpoint.every=2",
    ]
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert run_here([*mine, f"--steps={steps}", f"--output_dir={tmp_path / folder}"]) == 0
    whole, parts = (
        load_file(tmp_path / folder / "lora.safetensors") for folder in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())
    assert any("transformer_blocks.1.txt_mlp" in name for name in whole), (
        "other trainers' files have them too"
    )
