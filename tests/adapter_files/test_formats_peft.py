"""Adapters that PEFT itself has written are the function that PEFT makes of them, and what is not ours is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapter_files import files
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.verification import MAX_ERROR, verify_content
from adapter_files.writers import FileContent
from common.errors import AdapterError
from lora_algos.attach import attach, attach_from_file
from lora_algos.config import LayerSpec

TARGETS = ["linear", "conv"]


class Small(nn.Module):
    """A Linear layer and a convolution side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(16, 24), nn.Conv2d(16, 24, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.linear(x.movedim(1, -1)).movedim(-1, 1)


def base() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


INPUT = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def saved_by_peft(config, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def ours(folder: Path) -> Small:
    model = base()
    attach_from_file(model, *import_layers(*files.read_adapter(folder), model, LayerSpellings()))
    return model


def lokr(**options) -> LoKrConfig:
    return LoKrConfig(
        **{"r": 4, "alpha": 8, "target_modules": TARGETS, "init_weights": False, **options}
    )


CONFIGS = {
    "LoRA": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "LoRA rslora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True),
    "LoRA patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern={"conv": 2},
        alpha_pattern={"conv": 3},
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "LoHa": LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "LoHa tucker": LoHaConfig(r=4, alpha=8, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": lokr(r=2),
    "LoKr both": lokr(r=1, decompose_both=True),
    "LoKr whole factors": lokr(r=32),
    "LoKr some whole factors": lokr(r=4),
    "LoKr patterns": lokr(r=32, rank_pattern={"conv": 16}, alpha_pattern={"linear": 3}),
    "LoKr tucker": lokr(r=2, use_effective_conv2d=True),
    "LoKr both tucker": lokr(r=1, decompose_both=True, use_effective_conv2d=True),
}


@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_what_peft_saves_is_read_as_peft_reads_it(tmp_path, case):
    saved_by_peft(CONFIGS[case], tmp_path)
    expected, plain = PeftModel.from_pretrained(base(), tmp_path).eval()(INPUT), base()(INPUT)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(ours(tmp_path)(INPUT), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", [case for case in CONFIGS if case.startswith("LoKr") and "tucker" not in case]
)
@torch.no_grad()
def test_a_lokr_of_pefts_written_for_peft_is_the_same_again(tmp_path, case):
    saved_by_peft(CONFIGS[case], tmp_path / "theirs")
    expected = PeftModel.from_pretrained(base(), tmp_path / "theirs").eval()(INPUT)
    model = base()
    layers, _ = import_layers(*files.read_adapter(tmp_path / "theirs"), model, LayerSpellings())
    content = files.file_content(layers, model, LayerSpellings(), "peft", torch.float32)
    assert verify_content(content, layers, model, LayerSpellings()) <= MAX_ERROR
    write(tmp_path / "ours", content)
    torch.testing.assert_close(
        PeftModel.from_pretrained(base(), tmp_path / "ours").eval()(INPUT),
        expected,
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(ours(tmp_path / "ours")(INPUT), expected, rtol=0, atol=1e-5)


def write(folder: Path, content: FileContent) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(
        files.to_bytes(content.tensors, content.metadata)
    )
    (folder / "adapter_config.json").write_text(json.dumps(content.config))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_an_init_that_changed_the_base_is_refused(tmp_path, init):
    saved_by_peft(
        LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], init_lora_weights=init), tmp_path
    )
    with pytest.raises(
        AdapterError, match=f"init_lora_weights = {init}: (.|\n)*path_initial_model_for_weight"
    ):
        ours(tmp_path)


@torch.no_grad()
def test_one_that_peft_has_converted_is_read(tmp_path):
    model = get_peft_model(
        base(), LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], init_lora_weights="pissa")
    )
    model.peft_config[
        "default"
    ].init_lora_weights = True  # as PEFT's guide has it, so that the start can be loaded
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = model.eval()(INPUT)
    model.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    torch.testing.assert_close(ours(tmp_path / "end")(INPUT), expected, rtol=0, atol=1e-5)


def test_our_folders_name_no_init_that_changes_the_base():
    model = base()
    adapted = attach(model, {"linear": LayerSpec(4)}, seed=0)
    layers = files.adapter_layers(adapted)
    content = files.file_content(layers, model, LayerSpellings(), "peft", torch.float32)
    assert content.config is not None
    assert content.config.get("init_lora_weights", True) is True


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
BAD_CONFIGS = {
    "not UTF-8": (b"\xff\xfe{", "adapter_config.json"),
    "not JSON": (b"{", "not readable as JSON"),
    "a list": (b"[1]", "not a JSON object"),
    "no alpha": (
        json.dumps({**CONFIG, "lora_alpha": None}).encode(),
        "lora_alpha = None: not a number",
    ),
    "a word for alpha": (
        json.dumps({**CONFIG, "lora_alpha": "8"}).encode(),
        "lora_alpha = '8': not a number",
    ),
    "a broken pattern": (
        json.dumps({**CONFIG, "alpha_pattern": {"(": 1}}).encode(),
        "not a regular expression",
    ),
    "patterns in a list": (
        json.dumps({**CONFIG, "rank_pattern": [1]}).encode(),
        "not a JSON object",
    ),
    "no number in a pattern": (
        json.dumps({**CONFIG, "alpha_pattern": {"a": None}}).encode(),
        "not a number",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_broken_config_is_an_error_that_says_what_is_wrong(tmp_path, case):
    saved_by_peft(CONFIGS["LoRA"], tmp_path)
    content, words = BAD_CONFIGS[case]
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        ours(tmp_path)


@pytest.mark.parametrize("file_format", ["peft", "diffusers"])
def test_a_grouped_convolution_is_refused_where_peft_reads(file_format):
    model = nn.ModuleDict({"grouped": nn.Conv2d(8, 8, 3, groups=2), "linear": nn.Linear(8, 8)})
    adapted = attach(copy.deepcopy(model), dict.fromkeys(model, LayerSpec(4)), seed=0)
    layers = files.adapter_layers(adapted)
    with pytest.raises(AdapterError, match=r"grouped convolutions: 1 error\n  grouped"):
        files.file_content(layers, adapted.model, LayerSpellings(), file_format, torch.float32)
