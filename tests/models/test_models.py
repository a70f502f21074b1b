"""Loading a base model: every form it comes in gives the same model, and a bad one a message for the user."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers.ldm import save_single_file
from helpers.project import BASE
from safetensors.torch import save_file

from common.errors import ModelError
from models.base import ModelFamily
from models.config import ModelConfig, path_error
from models.detect import get_family
from objectives.config import ObjectiveConfig

CAPTIONS = ["a smiling cat, 3d style", "", "a " * 30 + "dog"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def save_folder(path: Path, dtype: torch.dtype, variant: str | None = None) -> None:
    StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=dtype).save_pretrained(
        path, variant=variant
    )


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(BASE, path, torch.float16)
    return path


@pytest.fixture(scope="module")
def forms(
    single_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ModelConfig]]:
    """The embedded base model in every form that a model comes in."""
    root = tmp_path_factory.mktemp("forms")
    save_folder(root / "variant", torch.float16, "fp16")
    repository = root / "hub" / "models--owner--name"
    shutil.copytree(BASE, repository / "snapshots" / "0123456789abcdef")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub")
        )  # read from the environment once
        yield {
            "folder": ModelConfig(path=str(BASE)),
            "variant": ModelConfig(path=str(root / "variant"), variant="fp16"),
            "file": ModelConfig(path=str(single_file), config=str(BASE)),
            "hub id": ModelConfig(path="owner/name"),
        }


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the embedded base model, to be changed."""
    return Path(shutil.copytree(BASE, tmp_path / "copy"))


def configs_of(folder: Path, single_file: Path) -> list[ModelConfig]:
    """The model in `folder` as such, and `single_file` with the folder as its configuration."""
    return [ModelConfig(path=str(folder)), ModelConfig(path=str(single_file), config=str(folder))]


@pytest.mark.parametrize("form", ["variant", "file", "hub id"])
def test_every_form_gives_the_model_of_the_folder(forms, form):
    expected, family = get_family(forms["folder"]), get_family(forms[form])
    weights, expected_weights = (
        f.load_denoiser(torch.float32).state_dict() for f in (family, expected)
    )
    assert weights.keys() == expected_weights.keys()
    assert not [name for name in weights if not weights[name].equal(expected_weights[name])]

    encoders, expected_encoders = family.load_encoders("text"), expected.load_encoders("text")
    prompts = [
        f.encode_prompt(e, CAPTIONS) for f, e in ((family, encoders), (expected, expected_encoders))
    ]
    assert all(a["prompt_embeds"].equal(b["prompt_embeds"]) for a, b in zip(*prompts, strict=True))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents, deviation = family.encode_media(family.load_encoders("media"), pixels)
        expected_latents, expected_deviation = expected.encode_media(
            expected.load_encoders("media"), pixels
        )
    assert latents.equal(expected_latents)
    assert deviation.equal(expected_deviation)
    assert latents.shape[-1] == 64 // family.limits.latent_step
    assert family.normalize(latents).equal(expected.normalize(expected_latents))

    process, expected_process = (f.process(ObjectiveConfig()) for f in (family, expected))
    assert process.prediction_type == expected_process.prediction_type == "epsilon"
    assert process.alphas_cumprod.equal(expected_process.alphas_cumprod)


def test_every_form_names_the_files_that_it_reads(forms):
    for form, component, wanted in [
        ("folder", "denoiser", "diffusion_pytorch_model.safetensors"),
        ("variant", "denoiser", "diffusion_pytorch_model.fp16.safetensors"),
        ("variant", "text", "model.fp16.safetensors"),
        ("file", "vae", "model.safetensors"),
        ("hub id", "text", "tokenizer.json"),
    ]:
        files = get_family(forms[form]).identity_files(component)
        assert wanted in [file.name for file in files], (form, component)
        assert all(file.is_file() for file in files)


def test_encode_prompt_equals_the_pipelines():
    family = get_family(ModelConfig(path=str(BASE)))
    encoded = family.encode_prompt(family.load_encoders("text"), CAPTIONS)
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    for caption, cond in zip(CAPTIONS, encoded, strict=True):
        expected, _ = pipeline.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        assert cond.keys() == {"prompt_embeds"}
        torch.testing.assert_close(cond["prompt_embeds"], expected[0], rtol=1e-5, atol=1e-5)


def test_predict_equals_the_denoiser():
    family = get_family(ModelConfig(path=str(BASE)))
    denoiser = family.load_denoiser(torch.float32)
    generator = torch.Generator().manual_seed(0)
    noisy, prompt_embeds = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 24, 96, generator=generator),
    )
    timestep = torch.tensor([3, 900])
    with torch.no_grad():
        expected = denoiser(noisy, timestep, prompt_embeds).sample
        assert family.predict(denoiser, noisy, timestep, {"prompt_embeds": prompt_embeds}).equal(
            expected
        )


def test_normalize_uses_the_scaling_factor_of_the_vae(copy, single_file):
    edit_json(copy / "vae" / "config.json", scaling_factor=0.5)
    for config in configs_of(copy, single_file):
        assert get_family(config).normalize(torch.tensor([3.0])).item() == 1.5


def test_v_prediction_is_read_from_the_scheduler(copy, single_file):
    edit_json(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    for config in configs_of(copy, single_file):
        family = get_family(config)
        assert family.process(ObjectiveConfig()).prediction_type == "v_prediction"
        metadata = family.file_metadata(family.load_denoiser(None))
        assert metadata["ss_base_model_version"] == "sd_v1_v"
        assert metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("width", "prediction_type", "version", "architecture"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v"),
    ],
)
def test_file_metadata_tells_the_base_version(copy, width, prediction_type, version, architecture):
    edit_json(copy / "scheduler" / "scheduler_config.json", prediction_type=prediction_type)
    config = {
        **UNet2DConditionModel.load_config(BASE, subfolder="unet"),
        "cross_attention_dim": width,
    }
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(config)
    metadata = get_family(ModelConfig(path=str(copy))).file_metadata(denoiser)
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(version.startswith("sd_v2"))
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
def test_weights_load_as_they_are_stored_but_fp16_as_fp32(tmp_path, form, stored):
    if form == "folder":
        save_folder(tmp_path / "model", stored)
        config = ModelConfig(path=str(tmp_path / "model"))
    else:
        save_single_file(BASE, tmp_path / "model.safetensors", stored)
        config = ModelConfig(path=str(tmp_path / "model.safetensors"), config=str(BASE))
    family = get_family(config)
    assert family.files.denoiser_dtype() == stored
    assert family.load_denoiser(None).dtype == (
        torch.float32 if stored == torch.float16 else stored
    )
    assert family.load_denoiser(torch.bfloat16).dtype == torch.bfloat16


def test_a_variant_beside_the_weights_is_not_mixed_up_with_them(tmp_path):
    save_folder(tmp_path, torch.float32)
    save_folder(tmp_path, torch.float16, "fp16")
    for variant, dtype, name in [
        (None, torch.float32, "diffusion_pytorch_model.safetensors"),
        ("fp16", torch.float16, "diffusion_pytorch_model.fp16.safetensors"),
    ]:
        family = get_family(ModelConfig(path=str(tmp_path), variant=variant))
        assert family.files.denoiser_dtype() == dtype
        files = [file.name for file in family.identity_files("denoiser")]
        assert files == ["config.json", name]


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    )


def corrupted(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"no safetensors")


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


UNET, UNET_CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16,
}
ASK: dict[str, Callable[[ModelFamily], object]] = {
    "denoiser": lambda family: family.load_denoiser(None),
    "denoiser, dtype given": lambda family: family.load_denoiser(torch.bfloat16),
    "encoders": lambda family: [family.load_encoders(what) for what in ("text", "media")],
    "text encoders": lambda family: family.load_encoders("text"),
    "normalize": lambda family: family.normalize(torch.ones(1)),
    "process": lambda family: family.process(ObjectiveConfig()),
}


@pytest.mark.parametrize(
    ("breaks", "ask", "words"),
    [
        pytest.param(without("unet"), "denoiser", "unet", id="no unet"),
        pytest.param(
            without("unet"), "denoiser, dtype given", "config.json", id="no unet, dtype given"
        ),
        pytest.param(without(UNET), "denoiser", "unet", id="no unet weights"),
        pytest.param(corrupted(UNET), "denoiser", "safetensors", id="corrupt unet"),
        pytest.param(
            corrupted(UNET), "denoiser, dtype given", "safetensors", id="corrupt unet, dtype given"
        ),
        pytest.param(corrupted(UNET_CONFIG), "denoiser", "JSON", id="corrupt unet config"),
        pytest.param(
            edited(UNET_CONFIG, block_out_channels=[64, 96, 128]),
            "denoiser",
            "conv_in",
            id="other sizes",
        ),
        pytest.param(
            edited(UNET_CONFIG, **SDXL), "denoiser", "size conditioning", id="unet of SDXL"
        ),
        pytest.param(corrupted("model_index.json"), "encoders", "JSON", id="corrupt index"),
        pytest.param(without("vae"), "encoders", "config.json", id="no vae"),
        pytest.param(without("vae"), "normalize", "config.json", id="no vae, all encoded before"),
        pytest.param(without("tokenizer"), "encoders", "tokenizer", id="no tokenizer"),
        pytest.param(without("scheduler"), "process", "scheduler_config", id="no scheduler"),
        pytest.param(
            edited(SCHEDULER, prediction_type="sample"),
            "process",
            "sample",
            id="scheduler predicts x0",
        ),
    ],
)
def test_a_broken_folder_is_a_message(copy, breaks, ask, words):
    breaks(copy)
    config = ModelConfig(path=str(copy))
    assert path_error(config) is None
    with pytest.raises(ModelError, match=words) as caught:
        ASK[ask](get_family(config))
    assert_one_message_about(caught.value, config)


@pytest.mark.parametrize("content", ["no safetensors", "other tensors"])
@pytest.mark.parametrize("config", [None, str(BASE)], ids=["no config", "config"])
@pytest.mark.parametrize("ask", ["denoiser", "encoders"])
def test_a_file_that_is_no_checkpoint_is_a_message(tmp_path, content, config, ask):
    corrupted("other.safetensors")(tmp_path)
    if content == "other tensors":
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    model = ModelConfig(path=str(tmp_path / "other.safetensors"), config=config)
    with pytest.raises(ModelError) as caught:
        ASK[ask](get_family(model))
    assert_one_message_about(caught.value, model)


def test_a_file_whose_config_is_not_available_is_a_message_that_says_what_to_do(single_file):
    config = ModelConfig(path=str(single_file))
    for ask in ("denoiser", "encoders", "process"):
        with pytest.raises(ModelError, match=r"--model\.config") as caught:
            ASK[ask](get_family(config))
        assert_one_message_about(caught.value, config)


def test_a_hub_id_that_cannot_be_downloaded_is_a_message():
    config = ModelConfig(path="nobody/nothing")
    assert path_error(config) is None
    with pytest.raises(ModelError, match="could not be downloaded from the Hub") as caught:
        get_family(config).load_denoiser(None)
    assert_one_message_about(caught.value, config)


def assert_one_message_about(error: ModelError, config: ModelConfig) -> None:
    """The message names the option and the path, once: no message inside a message, no Python."""
    text = str(error)
    assert text.count("--model.path") == 1
    assert text.startswith(f"--model.path {config.path}: ")
    assert "Traceback" not in text
    assert "<class" not in text


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("folder", Path.mkdir, "model_index.json"),
        ("model.ckpt", Path.touch, "is a .ckpt file; expected a .safetensors or .gguf file"),
        ("model", Path.touch, "is a nameless file; expected a .safetensors or .gguf file"),
        ("model.safetensors", None, "does not exist"),
        ("nowhere/model", None, "does not exist"),
        (None, None, "no model given"),
    ],
)
def test_a_path_that_cannot_be_a_model_is_an_error_by_its_name_alone(tmp_path, name, make, words):
    path = name and tmp_path / name
    if make:
        make(path)
    error = path_error(ModelConfig(path=path and str(path)))
    assert words in error
    assert str(path or "") in error


@pytest.mark.parametrize("key", ["lora_unet_mid_block.lora_down.weight", "unet.x.lora_A.weight"])
def test_an_adapter_is_not_a_base_model(tmp_path, key):
    path = tmp_path / "adapter.safetensors"
    save_file({key: torch.zeros(2, 4)}, path)
    with pytest.raises(ModelError, match="is an adapter file; expected a base model"):
        get_family(ModelConfig(path=str(path)))
