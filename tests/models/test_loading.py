"""Where the parts of a model come from, how its latents are scaled, and what is refused before anything is encoded."""

import json
import shutil
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from helpers.family_cases import Case, cases, folder_of, native_tensors
from helpers.ldm import save_single_file, vae_name, vae_tensor
from helpers.project import BASE
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ModelError
from models.base import ModelFamily, cond_bytes
from models.checkpoint_files import hub_id_of_shapes
from models.config import ModelConfig
from models.detect import get_family

CASES = {str(case): case for case in cases()}
SD3, SDXL = CASES["sd3"], CASES["sdxl"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The embedded model's tensors as in a whole checkpoint."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_single_file(BASE, path, torch.float32)
    return load_file(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The embedded model's folder without any weights."""
    return Path(
        shutil.copytree(BASE, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    )


def family_of_file(file: Path, tensors: dict[str, Tensor], config: Path | None) -> ModelFamily:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return get_family(ModelConfig(path=str(file), config=config and str(config)))


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A .safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [end, end := end + 4 * prod(shape)],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def folder_with(case: Case, path: Path, part: str, **changes: object) -> Path:
    """A copy of the case's folder in which the config of a part is changed."""
    return edited(Path(shutil.copytree(folder_of(case), path)), part, **changes)


def edited(folder: Path, part: str, **changes: object) -> Path:
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        t.equal(states[1][name]) for name, t in states[0].items()
    )


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_a_file_with_the_vae_takes_its_text_encoders_from_the_config(file, prefix):
    folder = folder_of(SD3)
    source = get_family(ModelConfig(path=str(folder)))
    vae = source.load_encoders("media").vae
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1  # another than the folder's
    levels = len(vae.config.block_out_channels)
    in_file = {
        prefix + vae_name(name, levels): vae_tensor(name, t) for name, t in vae.state_dict().items()
    }
    family = family_of_file(file, native_tensors(SD3, "model.diffusion_model.") | in_file, folder)
    assert same(family.load_encoders("media").vae, vae)
    loaded, expected = (each.load_encoders("text") for each in (family, source))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert same(getattr(loaded, name), getattr(expected, name)), name
    assert family.limits.latent_step == source.limits.latent_step
    assert family.identity_files("vae")[0] == family.identity_files("denoiser")[0] == file
    assert family.identity_files("text") == source.identity_files("text")
    whole = family.pipeline(None)
    assert same(whole.vae, vae)
    assert same(whole.text_encoder_3, expected.text_encoder_3)


def test_a_file_with_one_of_the_text_encoders_takes_the_others_from_the_config(file):
    folder = folder_of(SD3)
    source = get_family(ModelConfig(path=str(folder)))
    expected = source.load_encoders("text")
    with torch.no_grad():
        expected.text_encoder_3.shared.weight += 1
    in_file = {
        f"text_encoders.t5xxl.transformer.{n}": t
        for n, t in expected.text_encoder_3.state_dict().items()
    }
    in_file = {name: tensor.clone() for name, tensor in in_file.items()}
    family = family_of_file(file, native_tensors(SD3, "model.diffusion_model.") | in_file, folder)
    found = family.load_encoders("text")
    assert found.text_encoder_3.shared.weight.equal(expected.text_encoder_3.shared.weight)
    assert same(found.text_encoder_2, expected.text_encoder_2)
    assert same(family.load_encoders("media").vae, source.load_encoders("media").vae)
    assert file in family.identity_files("text")
    assert folder / "text_encoder_2" / "model.safetensors" in family.identity_files("text")


def test_a_whole_file_needs_no_weights_of_the_config(file, whole, configs):
    family, source = family_of_file(file, whole, configs), get_family(ModelConfig(path=str(BASE)))
    found, expected = (each.pipeline(None) for each in (family, source))
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(found, part), getattr(expected, part)), part
    assert cond_bytes(family) == cond_bytes(source)
    assert {path.suffix for path in family.identity_files("text") if path != file} == {".json"}


def test_large_text_encoders_of_a_whole_file_are_loaded_in_bf16(file, whole, configs, monkeypatch):
    monkeypatch.setattr("models.model_files.MIN_LARGE", 1000)
    encoders = family_of_file(file, whole, configs).load_encoders("text")
    assert encoders.text_encoder.dtype == torch.bfloat16


WIDTHS = [
    ((3072, 48, 1, 2, 2), (), "wan", "Wan2.2-TI2V-5B"),
    ((1536, 16, 1, 2, 2), (), "wan", "Wan2.1-T2V-1.3B"),
    ((5120, 16, 1, 2, 2), (), "wan", "Wan2.1-T2V-14B"),
    ((5120, 36, 1, 2, 2), ("img_emb.proj.0.weight",), "wan_i2v", "Wan2.1-I2V-14B-480P"),
    ((5120, 36, 1, 2, 2), (), "wan_i2v", "Wan2.2-I2V-A14B"),
]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["plain", "ComfyUI"])
@pytest.mark.parametrize(
    ("patches", "more", "name", "wanted"), WIDTHS, ids=[row[-1] for row in WIDTHS]
)
def test_files_of_wan_are_told_apart_by_their_shapes(file, prefix, patches, more, name, wanted):
    names = ("head.modulation", "blocks.0.self_attn.q.weight", *more)
    shapes = {"patch_embedding.weight": patches, **dict.fromkeys(names, (2, 2))}
    sparse_file(file, {prefix + key: shape for key, shape in shapes.items()})
    family = get_family(ModelConfig(path=str(file)))
    assert family.name == name
    assert family.files.source == f"Wan-AI/{wanted}-Diffusers"


def test_no_memory_is_taken_to_tell_which_model_a_file_is():
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "large": (1 << 20, 1 << 20),
    }  # 4 TiB
    assert "stable-diffusion" in hub_id_of_shapes(shapes)


def test_latents_are_normalized_by_the_statistics_of_the_vae(tmp_path):
    """As Playground v2.5's, which diffusers decodes as latents * std / scaling_factor + mean."""
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    changes = {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}
    family = get_family(
        ModelConfig(path=str(folder_with(SDXL, tmp_path / "playground", "vae", **changes)))
    )
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    shift, spread = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    for _ in range(2):
        torch.testing.assert_close(family.normalize(latents) * spread / 0.5 + shift, latents)


REFUSED = [
    pytest.param(
        "sdxl", "unet", {"in_channels": 9}, "9 channels; expected the 4", id="SDXL inpainting"
    ),
    pytest.param(
        "sdxl", "unet", {"in_channels": 8}, "8 channels; expected the 4", id="SDXL instruct-pix2pix"
    ),
    pytest.param("sdxl", "unet", {"cross_attention_dim": 1280}, "refiner", id="SDXL refiner"),
    pytest.param(
        "sdxl", "unet", {"addition_embed_type": None}, "size conditioning", id="SD1.5 named SDXL"
    ),
    pytest.param(
        "flux1-dev", "transformer", {"in_channels": 384}, "384 channels", id="FLUX.1 Fill"
    ),
    pytest.param(
        "wan", "transformer", {"in_channels": 36}, "36 channels", id="Wan, image to video"
    ),
]


@pytest.mark.parametrize(("case", "part", "changes", "words"), REFUSED)
def test_a_denoiser_that_cannot_be_trained_is_refused_first_of_all(
    tmp_path, case, part, changes, words
):
    folder = folder_with(CASES[case], tmp_path / "other", part, **changes)
    with pytest.raises(ModelError, match=words):
        get_family(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("channels", [8, 9])
def test_inpainting_and_editing_unets_are_refused_first_of_all(file, whole, configs, channels):
    edited(configs, "unet", in_channels=channels)
    for make in (
        lambda: get_family(ModelConfig(path=str(configs))),
        lambda: family_of_file(file, whole, configs),
    ):
        with pytest.raises(ModelError, match=f"takes {channels} channels"):
            make()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_both_kinds_of_fp8_are_widened(file, whole, configs, dtype):
    stored = {name: t.to(dtype) if name.startswith("model.") else t for name, t in whole.items()}
    denoiser = family_of_file(file, stored, configs).load_denoiser(None)
    assert denoiser.dtype == torch.bfloat16
    wanted = stored["model.diffusion_model.input_blocks.0.0.weight"].to(torch.bfloat16)
    assert denoiser.conv_in.weight.equal(wanted)
