"""Every family against diffusers' own pipeline of it, at a tiny size, and from images to a file that loads."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.family_cases import (
    PROMPTS,
    SIDE,
    Call,
    Case,
    cases,
    collate,
    control_contents,
    family_of,
    folder_of,
    rows_with_controls,
    run_pipeline,
    seen_in,
)
from safetensors import safe_open

from adapter_files.spellings import layer_spellings
from common.errors import ModelError
from data.precompute.controls import control_pictures
from lora_algos import ALGORITHMS
from models.base import ModelFamily, cond_bytes
from models.config import ModelConfig
from models.detect import get_family
from models.encoder_placement import (
    place_text_encoders,
    release_text_encoders,
    text_encoders_of,
)
from training.build import attach_adapters
from training.cli import load_config

CASES = pytest.mark.parametrize("case", cases(), ids=str)
VARIANTS = (
    "sdxl_inpaint", "sd3.5-medium", "sd3-without-t5", "flux1-schnell", "qwen_image_edit", "z_image_omni", "krea2-turbo",
    "wan2.2-high", "wan2.2-low", "wan2.2-i2v", "ltx2.3",
)  # fmt: skip
"""Cases whose layers are those of another case; make test-long trains them."""


SHAPES = pytest.mark.parametrize("shape", [(SIDE, SIDE), (2 * SIDE, SIDE)], ids=["square", "tall"])
Calls = dict[tuple[Case, tuple[int, int]], Call]


@pytest.fixture(scope="module")
def calls() -> Calls:
    return {}


def call_of(case: Case, calls: Calls, shape: tuple[int, int] = (SIDE, SIDE)) -> Call:
    if (case, shape) not in calls:
        calls[case, shape] = run_pipeline(case, *shape)
    return calls[case, shape]


def conditioning(
    case: Case, captions: list[str], shape: tuple[int, int] = (SIDE, SIDE)
) -> dict[str, torch.Tensor]:
    """What training would give the denoiser for images of that height and width with those captions."""
    family = family_of(case)
    with torch.no_grad():
        rows = rows_with_controls(family, captions, case.controls)
        of_media = {name: t[: len(captions)] for name, t in seen_in(case, family, shape).items()}
    height, width = shape
    crop = torch.tensor(
        [[width, height, width, height, 0, 0, width, height]] * len(captions), dtype=torch.int32
    )
    return {**family.size_conditioning(crop), **collate(family, rows), **of_media}


@CASES
def test_the_family_is_recognized_and_a_wrong_name_is_refused(case):
    path = str(folder_of(case))
    assert get_family(ModelConfig(path=path)).name == case.family
    with pytest.raises(ModelError, match=f"is {case.family}, not sd15"):
        get_family(ModelConfig(path=path, family="sd15"))


@SHAPES
@CASES
def test_predict_equals_the_pipelines_own_denoising_call(case, shape, calls):
    call, family = call_of(case, calls, shape), family_of(case)
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        timestep = call.timestep.expand(len(PROMPTS)).to(torch.float32)
        found = family.predict(denoiser, call.noisy, timestep, conditioning(case, PROMPTS, shape))
    assert found.shape == call.noisy.shape
    assert call.prediction.std() > 1e-3
    torch.testing.assert_close(
        found, call.prediction, rtol=1e-5, atol=1e-5 * float(call.prediction.abs().max())
    )


@CASES
def test_every_sample_of_a_batch_has_its_own_prediction(case, calls):
    call, family = call_of(case, calls), family_of(case)
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            here = slice(i, i + 1)
            timestep = call.timestep.reshape(1).to(torch.float32)
            found = family.predict(
                denoiser, call.noisy[here], timestep, conditioning(case, [prompt])
            )
            torch.testing.assert_close(found, call.prediction[here], rtol=1e-4, atol=1e-5)


@CASES
def test_predict_reads_no_value_from_the_device(case, calls, monkeypatch):
    """On the meta device there are none."""
    # some models turn autocast off for a block, which fails for devices without autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    call, family = call_of(case, calls), family_of(case)
    cond = {
        name: t.to("meta") if isinstance(t, torch.Tensor) else t
        for name, t in conditioning(case, PROMPTS).items()
    }
    noisy = family.normalize(torch.empty_like(call.noisy, device="meta"))
    found = family.predict(
        family.empty_denoiser(), noisy, torch.empty(len(PROMPTS), device="meta"), cond
    )
    assert found.is_meta
    assert found.shape == call.noisy.shape


@CASES
def test_normalized_latents_are_what_the_pipeline_denoises(case, calls):
    call, family = call_of(case, calls), family_of(case)
    torch.testing.assert_close(family.normalize(call.decoded.reshape(call.final.shape)), call.final)


@CASES
def test_latents_have_the_shape_that_the_family_says(case):
    family = family_of(case)
    pixels = torch.rand(2, 3, 2 * SIDE, SIDE) * 2 - 1
    encoders = family.load_encoders("media")
    with torch.no_grad():
        mean, deviation = family.encode_media(encoders, pixels)[:2]
        assert mean.shape == deviation.shape
        step = family.limits.latent_step
        assert (mean.shape[0], mean.shape[1], *mean.shape[-2:]) == (
            2, family.latent_channels, 2 * SIDE // step, SIDE // step
        )  # fmt: skip
        assert family.decode_media(encoders, mean).shape == pixels.shape
    assert family.limits.pixel_step % step == 0


LARGER_THAN_A_TILE = 640
"""Height in pixels, of which every VAE takes two tiles."""


def encoded(case: Case, pixels: torch.Tensor, **options) -> torch.Tensor:
    family = get_family(ModelConfig(path=str(folder_of(case)), **case.model, **options))
    with torch.no_grad():
        mean, deviation = family.encode_media(family.load_encoders("media"), pixels)
    assert mean.dtype == deviation.dtype == torch.float32
    return mean


@CASES
def test_a_vae_in_bf16_or_in_tiles_encodes_nearly_the_same(case):
    """Tiles have norms of their own, which count for more at this size than at a real one."""
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 2 * SIDE, SIDE) * 2 - 1
    expected = encoded(case, pixels)
    rounded = encoded(case, pixels, vae_dtype="bf16")
    assert 0 < (rounded - expected).norm() <= 0.05 * expected.norm()
    vae = family_of(case).load_encoders("media").vae
    is_of_video = hasattr(vae, "tile_sample_min_height")
    if is_of_video:  # these VAEs have tiles of at least 256
        pixels = torch.rand(1, 3, LARGER_THAN_A_TILE, SIDE) * 2 - 1
        expected = encoded(case, pixels)
    tiled = encoded(case, pixels, vae_tiling=True)
    assert 0 < (tiled - expected).norm() <= 0.75 * expected.norm()


@pytest.mark.parametrize("role", ["media", "preview"])
def test_tiles_are_used_to_encode_and_to_draw(role):
    config = ModelConfig(path=str(folder_of(cases()[0])), vae_tiling=True)
    family = get_family(config)
    pipeline = family.load_encoders("media") if role == "media" else family.pipeline(None)
    assert pipeline.vae.use_tiling


def test_latents_of_another_dtype_are_stored_elsewhere():
    tags = set()
    for options in ({}, {"vae_dtype": "bf16"}, {"vae_dtype": "fp16"}, {"vae_tiling": True}):
        family = get_family(ModelConfig(path=str(folder_of(cases()[0])), **options))
        tags.add(family.media_cache_tag)
    assert len(tags) == 4


def test_a_vae_that_overflows_is_not_used_in_fp16(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of(next(case for case in cases() if case.family == "sdxl")), folder)
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    for overflows in (True, False):
        path.write_text(json.dumps({**config, "force_upcast": overflows}))
        family = get_family(ModelConfig(path=str(folder), vae_dtype="fp16"))
        if overflows:
            with pytest.raises(ModelError, match="this VAE overflows in fp16"):
                family.load_encoders("media")
        else:
            assert family.load_encoders("media").vae.dtype == torch.float16


@CASES
@pytest.mark.parametrize("placement", ["device", "layers"])
def test_text_encoders_are_freed(case, placement):
    """Without a garbage collection, which may come only when the denoiser is loaded."""
    encoders = family_of(case).load_encoders("text")
    modules = [
        weakref.ref(component)
        for component in encoders.components.values()
        if isinstance(component, torch.nn.Module)
    ]
    assert modules
    encoders = place_text_encoders(encoders, placement, torch.device("cpu"))
    gc.disable()
    try:
        release_text_encoders(encoders)
        assert not any(module() is not None for module in modules)
    finally:
        gc.enable()


def encoded_captions(case: Case, family: ModelFamily, encoders: Any) -> list[dict[str, Any]]:
    """Conditioning of PROMPTS, with control images if the text encoder sees them."""
    if not family.controls.is_seen_by_text_encoder:
        return family.encode_prompt(encoders, PROMPTS)
    pictures = control_pictures(control_contents(case.controls), "white")
    return [family.encode_with_controls(encoders, prompt, pictures) for prompt in PROMPTS]


@CASES
def test_text_encoders_encode_the_same_layer_by_layer(case):
    family = family_of(case)
    rows = {}
    with torch.no_grad():
        for placement in ("device", "layers", "cpu"):
            encoders = family.load_encoders("text")
            parts = text_encoders_of(encoders)
            loaded = [dict(part.named_parameters()) for part in parts]
            encoders = place_text_encoders(encoders, placement, torch.device("cpu"))
            rows[placement] = encoded_captions(case, family, encoders)
            for part, weights in zip(parts, loaded, strict=True):
                for name, weight in part.named_parameters():
                    assert weight is weights[name], "no copy stays on the device"
    for placement in ("layers", "cpu"):
        for row, expected in zip(rows[placement], rows["device"], strict=True):
            assert row.keys() == expected.keys()
            assert all(row[name].equal(expected[name]) for name in row)


@CASES
def test_conditioning_comes_back_from_comfyuis_layout(case):
    family = family_of(case)
    with torch.no_grad():
        row = encoded_captions(case, family, family.load_encoders("text"))[0]
    cond, extras = family.comfy.write(row)
    assert (cond.ndim, cond.shape[0], "pooled_output" in extras) == (3, 1, True)
    back = family.comfy.tensors(cond, extras)
    assert back.keys() == row.keys()
    assert all(back[name].equal(row[name]) for name in row)


@pytest.mark.parametrize("case", [case for case in cases() if case.comfy], ids=str)
def test_comfyuis_own_conditioning_gives_the_same_prediction(case, calls):
    call, family = call_of(case, calls), family_of(case)
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        cond = family.comfy.read(*case.comfy(family.load_encoders("text"), PROMPTS[0]))
        timestep = call.timestep.reshape(1).to(torch.float32)
        found = family.predict(denoiser, call.noisy[:1], timestep, collate(family, [cond]))
    torch.testing.assert_close(found, call.prediction[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in cases() if case.comfy], ids=str)
def test_captions_of_other_lengths_do_not_see_each_other(case, calls):
    """They are in one batch where the model has a mask, or padding is what it was trained with; else in others."""
    family, call = family_of(case), call_of(case, calls)
    with torch.no_grad():
        tokens, extras = case.comfy(family.load_encoders("text"), PROMPTS[0])
        masks = {name: extra[:, :-7] for name, extra in extras.items() if name == "attention_mask"}
        conds = [
            family.comfy.read(tokens[:, :-7], {**extras, **masks}),
            family.comfy.read(tokens, extras),
        ]
        if not family.variable_length:
            with pytest.raises(ValueError, match="of one batch differ"):
                collate(family, conds)
            return
        denoiser = family.load_denoiser(torch.float32).eval()
        timestep, noisy = (
            call.timestep.expand(2).to(torch.float32),
            call.noisy[:1].expand(2, *call.noisy.shape[1:]),
        )
        together = family.predict(denoiser, noisy, timestep, collate(family, conds))
        alone = family.predict(denoiser, noisy[:1], timestep[:1], collate(family, conds[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", [case for case in cases() if family_of(case).variable_length], ids=str
)
def test_no_token_is_hidden_from_all_others(case, calls, monkeypatch):
    """Fused CUDA kernels may return NaN for a query without any key."""
    family, call = family_of(case), call_of(case, calls)
    attention = torch.nn.functional.scaled_dot_product_attention
    masks = []

    def record_mask(query, key, value, attn_mask=None, **options):
        masks.append(attn_mask)
        return attention(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record_mask)
    with torch.no_grad():
        cond = conditioning(case, PROMPTS)
        denoiser = family.load_denoiser(torch.float32).eval()
        noisy = call.noisy[:1].expand(2, *call.noisy.shape[1:])
        masks.clear()
        family.predict(denoiser, noisy, call.timestep.expand(2).float(), cond)
    assert masks, "diffusers' attention is the one of torch"
    for mask in masks:
        if mask is not None:
            assert mask.dtype == torch.bool
            assert mask.any(-1).all()


@CASES
def test_a_caption_is_as_large_as_the_family_says(case):
    family = family_of(case)
    with torch.no_grad():
        row = encoded_captions(case, family, family.load_encoders("text"))[0]
    assert sum(t.nbytes for t in row.values()) <= cond_bytes(family)
    counts, limit = family.count_tokens(PROMPTS)
    assert 0 < counts[1] < counts[0] <= limit


@pytest.fixture
def flags(options, videos, controls):
    """Case -> a run of three steps of every layer."""

    def of_case(case: Case) -> list[str]:
        other = (
            "--model.path",
            "--adapter.targets",
            *(["--data.path"] if case.first_frame else []),
        )
        return [
            *(option for option in options if not option.startswith(other)),
            f"--model.path={folder_of(case)}", "--adapter.targets=all", "--steps=3", f"--data.resolution={SIDE}",
            *case.options, *([f"--data.path={videos}", "--data.frames=5"] if case.first_frame else []),
            *(["--data.control_paths", *map(str, controls[: case.controls])] if case.controls else []),
        ]  # fmt: skip

    return of_case


BF16_CASES = (
    "sdxl", "flux1-dev", "flux2_klein", "flux3", "qwen_image_21", "qwen_image_edit_plus", "wan", "ltx2",
    "hunyuan_video15",
)  # fmt: skip
"""Cases with code of their own that depends on the dtype: make test compares these."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if str(case) in BF16_CASES else pytest.mark.long)
        for case in cases()
    ],
    ids=str,
)
def test_training_in_bf16_with_checkpoints_is_near_that_in_fp32(
    case, flags, run_here, tmp_path, capsys
):
    losses = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        mine = [
            *flags(case),
            "--gradient_checkpointing",
            f"--training_dtype={dtype}",
            f"--output_dir={out}",
        ]
        assert run_here(mine) == 0, capsys.readouterr().err
        losses[dtype] = json.loads((out / "loss.json").read_text())["loss_per_step"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


@CASES
def test_all_that_is_trained_gets_a_gradient_and_nothing_else(case, calls, flags):
    call, family = call_of(case, calls), family_of(case)
    denoiser = family.load_denoiser(torch.float32)
    adapted, _ = attach_adapters(
        load_config(flags(case)), family, denoiser, layer_spellings(family, denoiser)
    )
    trained = adapted.named_parameters().keys()
    denoiser.requires_grad_(True)
    parameters = adapted.named_parameters()
    timestep = call.timestep.expand(len(PROMPTS)).to(torch.float32)
    family.predict(
        denoiser, call.noisy, timestep, conditioning(case, PROMPTS)
    ).square().mean().backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == trained


EVERY_ALGORITHM = ("wan",)
"""Cases that are trained with every algorithm by make test; the others follow in make test-long."""


def trained_pairs() -> Iterator[Any]:
    """Every case and algorithm; most are marked as long."""
    for case in cases():
        for algorithm in ALGORITHMS:
            is_short = algorithm == "LoRA" and str(case) not in VARIANTS
            is_short = is_short or str(case) in EVERY_ALGORITHM
            marks = () if is_short else pytest.mark.long
            yield pytest.param(case, algorithm, marks=marks, id=f"{case}-{algorithm}")


@pytest.mark.parametrize(("case", "algorithm"), trained_pairs())
def test_training_writes_a_file_that_training_goes_on_from(
    case, algorithm, flags, run_here, tmp_path, capsys
):
    """Images in, three steps, previews, a file of every tensor's own name; and three steps more from that file, in bf16
    with checkpoints."""
    mine = [
        *flags(case), f"--algorithm={algorithm}", "--preview", "--sample.num_inference_steps=2"
    ]  # fmt: skip
    out = tmp_path / "out"
    assert run_here(mine) == 0, capsys.readouterr().err
    assert (out / "preview.png").is_file()
    with safe_open(out / "lora.safetensors", framework="pt") as file:
        assert any(file.get_tensor(key).any() for key in file.keys())  # noqa: SIM118
    more = [
        f"--existing_lora={out / 'lora.safetensors'}",
        f"--output_dir={tmp_path / 'more'}",
        "--no_preview",
        "--gradient_checkpointing",
        "--training_dtype=bf16",
    ]
    assert run_here([*mine, *more]) == 0, capsys.readouterr().err
    assert "total steps: 3 of the existing adapter + 3 = 6" in capsys.readouterr().out
