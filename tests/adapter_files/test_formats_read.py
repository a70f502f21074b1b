"""Adapter files of other programs: read with each layer's own algorithm, rank and alpha, as the same change of the
weights."""

import re

import pytest
import torch
from helpers.adapter_file_cases import (
    CONV,
    LINEAR,
    names,
    on_layers,
    output,
    unet,
    with_norms,
    written,
)
from safetensors.torch import save_file
from torch import Tensor

from adapter_files import files
from adapter_files.reader import import_layers
from common.errors import AdapterError
from lora_algos.attach import attach_from_file
from lora_algos.targets import layers_of
from training.metadata import total_steps_of

NATIVE = {name: native.replace(".", "_") for name, native in names().original.items()}
KOHYA = "lora_unet_" + LINEAR.replace(".", "_")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return (
        torch.randn(
            shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
        )
        / 4
    )


def effective(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Layer -> the change of its weight that a file makes."""
    model = unet()
    plain = {
        name: module.weight.clone()
        for name, module in layers_of(model)
        if hasattr(module, "weight")
    }
    adapted = attach_from_file(model, *import_layers(tensors, metadata or {}, model, names()))
    adapted.merge()
    return {name: layer.base_layer.weight - plain[name] for name, layer in adapted.layers().items()}


def expect(
    tensors: dict[str, Tensor], layer: str, delta: Tensor, metadata: dict[str, str] | None = None
) -> None:
    changed = effective({key: tensor.float() for key, tensor in tensors.items()}, metadata)
    assert changed.keys() == {layer}
    assert delta.norm() > 0.1
    torch.testing.assert_close(
        changed[layer].double(), delta.reshape(changed[layer].shape), rtol=0, atol=2e-6
    )


UP, DOWN = noise(128, 3), noise(3, 128)  # of LINEAR, (128, 128)
LORA = UP @ DOWN
SPELLINGS = {
    "kohya": (f"{KOHYA}.lora_up.weight", f"{KOHYA}.lora_down.weight"),
    "kohya with sgm names": tuple(
        f"lora_unet_{NATIVE[LINEAR]}.lora_{side}.weight" for side in ("up", "down")
    ),
    "LyCORIS": tuple(
        f"lycoris_{LINEAR.replace('.', '_')}.lora_{side}.weight" for side in ("up", "down")
    ),
    "ComfyUI": tuple(
        f"diffusion_model.{names().original[LINEAR]}.lora_{side}.weight" for side in ("up", "down")
    ),
    "diffusers": (f"unet.{LINEAR}.lora_B.weight", f"unet.{LINEAR}.lora_A.weight"),
    "diffusers, old": (f"unet.{LINEAR}.lora.up.weight", f"unet.{LINEAR}.lora.down.weight"),
    "diffusers, oldest": tuple(
        f"unet.{LINEAR.replace('.to_q', '.processor.to_q')}_lora.{side}.weight"
        for side in ("up", "down")
    ),
    "PEFT": (
        f"base_model.model.{LINEAR}.lora_B.weight",
        f"base_model.model.{LINEAR}.lora_A.weight",
    ),
    "PEFT's module": (f"{LINEAR}.lora_B.default.weight", f"{LINEAR}.lora_A.default.weight"),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_every_program_spells_a_layer_its_own_way(program):
    up, down = SPELLINGS[program]
    expect({up: UP, down: DOWN}, LINEAR, LORA)  # without an alpha: scaled by 1


def test_each_layer_has_its_own_rank_and_alpha():
    conv = "lora_unet_" + CONV.replace(".", "_")
    tensors = {
        f"{KOHYA}.lora_up.weight": UP, f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.alpha": torch.tensor(1.5),
        f"{conv}.lora_up.weight": noise(56, 2, 1, 1), f"{conv}.lora_down.weight": noise(2, 56, 3, 3),
        f"{conv}.alpha": torch.tensor(8),
    }  # fmt: skip
    model = unet()
    specs = attach_from_file(model, *import_layers(tensors, {}, model, names())).specs()
    assert {name: (spec.rank, spec.alpha) for name, spec in specs.items()} == {
        LINEAR: (3, 1.5),
        CONV: (2, 8.0),
    }


def test_algorithms_may_be_mixed_in_one_file():
    tensors = {
        **written(on_layers("LoHa", [CONV]), "kohya").tensors,
        **written(on_layers("OFT", [LINEAR]), "kohya").tensors,
    }
    model = unet()
    adapted = attach_from_file(model, *import_layers(tensors, {}, model, names()))
    assert {name: spec.algorithm for name, spec in adapted.specs().items()} == {
        CONV: "LoHa",
        LINEAR: "OFT",
    }


def test_the_nodes_file_with_flat_convolutions_a_trained_alpha_and_norms():
    adapted = with_norms()
    tensors = {
        key: tensor.flatten(1) if "lora_" in key and tensor.ndim > 2 else tensor
        for key, tensor in written(adapted, "comfyui").tensors.items()
    }
    tensors = {key: t * 1.001 if key.endswith("alpha") else t for key, t in tensors.items()}
    for layer in adapted.layers().values():
        if layer.algorithm.name == "LoRA":
            layer.update_tensors()["lora_up.weight"].data.mul_(1.001)
    model = unet()
    attach_from_file(model, *import_layers(tensors, {}, model, names()))
    torch.testing.assert_close(output(model), output(adapted.model), rtol=0, atol=2e-5)


def test_a_lora_with_a_core_is_read_with_the_core_worked_in():
    up, mid, down = noise(56, 2, 1, 1), noise(2, 2, 3, 3), noise(2, 56, 1, 1)
    conv = "lora_unet_" + CONV.replace(".", "_")
    delta = torch.einsum("or,rjkl,ji->oikl", up[..., 0, 0], mid, down[..., 0, 0]) * (0.5 / 2) * 40
    tensors = {
        f"{conv}.lora_up.weight": up * 40,
        f"{conv}.lora_mid.weight": mid,
        f"{conv}.lora_down.weight": down,
    }
    expect({**tensors, f"{conv}.alpha": torch.tensor(0.5)}, CONV, delta)


@pytest.mark.parametrize("whole", [True, False])
def test_a_lokr_with_a_core_is_rebuilt(whole):
    """ComfyUI leaves such a layer unchanged; lycoris.functional scales it by alpha / out."""
    w1_a, w1_b, core = noise(7, 2), noise(2, 7), noise(2, 2, 3, 3)
    w2_a, w2_b = noise(2, 8), noise(2, 8)
    w2 = torch.einsum("ijkl,ip,jr->prkl", core, w2_a, w2_b).contiguous()
    delta = torch.kron((w1_a @ w1_b)[..., None, None], w2) * (6.0 / 2)
    first = {"lokr_w1": w1_a @ w1_b} if whole else {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b}
    tensors = {
        **first,
        "lokr_t2": core,
        "lokr_w2_a": w2_a,
        "lokr_w2_b": w2_b,
        "alpha": torch.tensor(6.0),
    }
    expect(
        {f"lora_unet_{CONV.replace('.', '_')}.{name}": t for name, t in tensors.items()},
        CONV,
        delta,
    )


def test_a_lokr_may_be_split_anyhow():
    w1, w2 = (
        noise(64, 2),
        noise(2, 64),
    )  # PEFT leaves the larger part first where the factor asks for it
    expect(
        {f"{KOHYA}.lokr_w1": w1, f"{KOHYA}.lokr_w2": w2, f"{KOHYA}.alpha": torch.tensor(9.0)},
        LINEAR,
        torch.kron(w1, w2),
    )


def test_a_dora_of_lycoris_is_read_as_peft_has_it():
    weight = dict(unet().named_parameters())[f"{LINEAR}.weight"].detach().double()
    scale = noise(128, 1).abs() + 0.5
    moved = weight + LORA
    delta = scale * moved / moved.norm(dim=1, keepdim=True) - weight
    tensors = {
        f"{KOHYA}.lora_up.weight": UP,
        f"{KOHYA}.lora_down.weight": DOWN,
        f"{KOHYA}.dora_scale": scale,
    }
    expect(tensors, LINEAR, delta)


def test_alphas_in_diffusers_and_pefts_metadata_are_used():
    tensors = {f"unet.{LINEAR}.lora_B.weight": UP, f"unet.{LINEAR}.lora_A.weight": DOWN}
    for text, scaling in (
        ('{"unet.r": 3, "unet.lora_alpha": 6}', 2.0),
        ('{"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.*": 12}}', 4.0),
        ('{"r": 3, "lora_alpha": 3, "use_rslora": true}', 3**0.5),
    ):
        expect(tensors, LINEAR, LORA * scaling, {"lora_adapter_metadata": text})


def test_the_constraint_of_lycoris_is_per_channel_and_comfyuis_is_not():
    adapted = on_layers("OFT constraint", [LINEAR])
    layer = adapted.layers()[LINEAR]
    blocks = layer.update_tensors()["oft_blocks"].detach()
    tensors = {f"{KOHYA}.oft_blocks": blocks, f"{KOHYA}.alpha": torch.tensor(0.5)}
    expect(tensors, LINEAR, layer.delta_weight().detach().double())
    tensors[f"{KOHYA}.alpha"] = torch.tensor(0.5 / 128)
    expect(
        tensors,
        LINEAR,
        layer.delta_weight().detach().double(),
        {"ss_network_module": "lycoris.kohya"},
    )


@pytest.mark.parametrize(
    ("name", "metadata", "steps"),
    [
        ("a.safetensors", {"train_lora.total_steps": "70", "ss_steps": "9"}, 70),
        ("a_300_steps_00001_.safetensors", {"ss_steps": "9"}, 9),
        ("ComfyUI_trained_lora_300_steps_00001_.safetensors", {}, 300),
        ("my_style.safetensors", {}, 0),
        ("steps_12.safetensors", {"ss_steps": "many"}, 0),
    ],
)
def test_steps_come_from_the_metadata_else_from_the_name(name, metadata, steps):
    assert total_steps_of(f"/some_7_steps_/{name}", metadata) == steps


GOOD = {f"{KOHYA}.lora_up.weight": UP.float(), f"{KOHYA}.lora_down.weight": DOWN.float()}
BAD: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "a layer that is not there": (
        {"lora_unet_no.alpha": torch.ones(())},
        ["lora_unet_no.alpha ()", "the model has no layer of this name"],
    ),
    "a text encoder": ({"lora_te_mlp_fc1.alpha": torch.ones(())}, ["lora_te_mlp_fc1"]),
    "no tensor of an adapter": (
        {f"{KOHYA}.weight": torch.ones(2)},
        [f"{KOHYA}.weight (2,)", "not a tensor of an adapter"],
    ),
    "half a layer": ({f"lora_unet_{CONV.replace('.', '_')}.lora_up.weight": torch.ones(56, 2)}, [CONV, "lora_down"]),
    "NaN": ({f"{KOHYA}.lora_up.weight": UP.float() / 0}, [LINEAR, "not finite"]),
    "wrong shape": ({f"{KOHYA}.lora_down.weight": torch.ones(3, 96)}, [LINEAR, "(3, 96)", "(128, 128)"]),
    "two algorithms on one layer": ({f"{KOHYA}.diff": torch.ones(128, 128)}, [LINEAR, "diff"]),
    "PEFT's OFT": ({f"unet.{CONV}.oft_R.weight": torch.ones(4, 6)}, [CONV, "rotates the layer's input"]),
    "in-axis DoRA": ({f"{KOHYA}.dora_scale": torch.ones(1, 128)}, [LINEAR, "dora_scale is (1, 128)", "input channel"]),
    "a rescaled OFT": ({f"{KOHYA}.rescale": torch.ones(128, 1)}, [LINEAR, "rescale"]),
    "an odd LoKr": ({f"lora_unet_{CONV.replace('.', '_')}.lokr_w1": torch.ones(5, 5)}, [CONV, "lokr_w1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_matched_is_an_error_that_lists_it(case):
    tensors, words = BAD[case]
    model = unet()
    with pytest.raises(AdapterError) as caught:
        attach_from_file(model, *import_layers({**GOOD, **tensors}, {}, model, names()))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert not any("lora" in name for name, _ in model.named_modules()), (
        "the model was changed before the error was found"
    )


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha", "Stable Diffusion 3"),
        (
            "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q.alpha",
            "Stable Diffusion XL",
        ),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
    ],
)
def test_a_file_for_another_model_is_called_by_its_name(key, what):
    model = unet()
    with pytest.raises(AdapterError, match=f"looks like one for {re.escape(what)}"):
        attach_from_file(model, *import_layers({key: torch.ones(())}, {}, model, names()))


def test_files_that_are_no_safetensors_are_told_apart(tmp_path):
    save_file(GOOD, tmp_path / "good")
    contents = {
        "empty": (b"", "not a readable .safetensors"),
        "text": (b"no safetensors at all", "not a readable .safetensors"),
        "cut short": ((tmp_path / "good").read_bytes()[:-100], "cut short"),
        "pickle": (b"\x80\x02}q\x00.", "pickle"),
        "zipped pickle": (b"PK\x03\x04rest", "weights_only=True"),
    }
    for name, (content, words) in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(AdapterError, match=words) as caught:
            files.read_adapter(path)
        assert str(path) in str(caught.value)
    with pytest.raises(AdapterError, match="not a readable"):
        files.read_adapter(tmp_path / "missing.safetensors")
