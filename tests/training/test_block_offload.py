"""Offloaded blocks: the same numbers bit for bit, two blocks on the device, weights that nothing moves."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.project import BASE
from helpers.runs import assert_same_result
from torch import Tensor, nn

from models.blocks import find_blocks, inner_blocks
from models.quantization import quantize_blocks
from training import block_offload, gradient_checkpointing
from training.block_offload import HostWeights, evenly_spaced, offloaded_blocks
from training.memory.config import MemoryConfig
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import BASE as COPIES
from training.memory.phase_memory import HOST

CPU = torch.device("cpu")
REST = "rest"
CHECKPOINTED = ("--gradient_checkpointing",)
COMBINATIONS = [
    ("all",),
    ("50%", "--training_dtype=bf16", "--model.quantization=nf4"),
    ("3", "--checkpoint_depth=2", "--checkpoint_policy=keep-attention-output"),
    ("all", "--checkpoint_blocks=4", "--algorithm=DoRA", "--training_dtype=bf16", "--model.quantization=int8"),
    ("all", "--adapter.init=pissa", "--adapter.targets", ".*attn1.*"),
    ("all", "--algorithm=OFT", "--adapter.dropout=0.1", "--grad_accumulation_steps=2"),
]  # fmt: skip


def unet(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = UNet2DConditionModel.from_pretrained(BASE / "unet").to(dtype)
    return model.requires_grad_(False).train()


def predict(model: nn.Module, latents: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, 96, generator=draw)
    return model(latents, torch.tensor([5, 500]), text, return_dict=False)[0]


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def input_gradient(model: nn.Module) -> Tensor:
    inputs = latents().requires_grad_()
    predict(model, inputs).square().mean().backward()
    assert inputs.grad is not None
    return inputs.grad


def offload(model: nn.Module) -> list[block_offload.Offloaded]:
    """Checkpoint all blocks and offload the inner ones."""
    blocks = find_blocks(model, 1)
    block_offload.apply(list(inner_blocks(blocks).values()), CPU)
    gradient_checkpointing.apply(model, blocks)
    return offloaded_blocks(model)


def count_copies(model: nn.Module) -> LiveBytes:
    """Counts the copies on the device apart from the rest."""
    live_bytes = LiveBytes()
    live_bytes.label([*model.parameters(), *model.buffers()], REST)
    for block in offloaded_blocks(model):
        live_bytes.label([block.host_weights.buffer], HOST)
    live_bytes.reset_peak()
    return live_bytes


@pytest.mark.parametrize(
    "combination",
    [
        *COMBINATIONS[:3],
        *(pytest.param(combination, marks=pytest.mark.long) for combination in COMBINATIONS[3:]),
    ],
    ids=" ".join,
)
def test_a_run_is_the_same_bit_for_bit(options, run_here, tmp_path, combination):
    number, *more = combination
    plain, offloaded = tmp_path / "plain", tmp_path / "offloaded"
    for folder, value in ((plain, "0"), (offloaded, number)):
        run = [*options, *CHECKPOINTED, *more, f"--output_dir={folder}"]
        assert run_here([*run, f"--memory.offload_blocks={value}"]) == 0
    assert_same_result(plain, offloaded)


def test_a_run_resumes_with_other_blocks_and_draws(options, run_here, tmp_path):
    run = [option for option in options if option != "--no_preview"]
    run += [*CHECKPOINTED, "--sample.num_inference_steps=2", "--sample.prompts", "cat"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here([*run, f"--output_dir={whole}"]) == 0
    for steps, number in ((2, "all"), (6, "2")):
        resumed = [f"--output_dir={parts}", f"--steps={steps}", f"--memory.offload_blocks={number}"]
        assert run_here([*run, *resumed]) == 0
    assert_same_result(whole, parts)
    assert (whole / "preview.png").read_bytes() == (parts / "preview.png").read_bytes()


def test_two_blocks_are_on_the_device():
    plain = unet()
    expected = input_gradient(plain)
    model = unet()
    blocks = offload(model)
    sizes = [block.host_weights.buffer.nbytes for block in blocks]
    assert sum(sizes) > 0.8 * sum(weight.nbytes for weight in plain.parameters())
    assert torch.equal(input_gradient(model), expected)  # learns the order of the blocks
    order = [weights.buffer.nbytes for weights in blocks[0].copier.order]
    assert sorted(order) == sorted(sizes)
    assert len(order) > 3
    neighbors = [a + b for a, b in itertools.pairwise(order)]
    live_bytes = count_copies(model)
    with live_bytes:
        gradient = input_gradient(model)
    assert torch.equal(gradient, expected)
    assert live_bytes.at_peak[COPIES] <= max(neighbors)
    assert live_bytes.current[COPIES] <= order[0]  # for the next step
    assert live_bytes.current[HOST] == sum(sizes)


def test_passes_in_any_order_are_right():
    """A guess of the next block that is wrong costs a copy and nothing else."""
    model, plain = unet(), unet()
    offload(model)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(predict(model, latents()), predict(plain, latents()))
        with torch.inference_mode():
            predict(model, latents())
        predict(model, latents().requires_grad_())  # without a backward pass
        assert torch.equal(input_gradient(model), input_gradient(plain))


def test_a_pass_that_fails_leaves_the_weights_on_the_host():
    model = unet()
    blocks = offload(model)
    with pytest.raises(RuntimeError):
        model(latents(), torch.tensor([5, 500]), torch.zeros(2, 7, 3))
    for block in blocks:
        for (module, name), weight in zip(
            block.host_weights.slots, block.host_weights.parameters, strict=True
        ):
            assert getattr(module, name) is weight
    assert torch.equal(input_gradient(model), input_gradient(unet()))


@pytest.mark.parametrize("format", [None, "int8", "nf4"])
def test_weights_keep_values_layout_and_sharing(format):
    model = unet(torch.bfloat16)
    block = find_blocks(model, 1)["down_blocks.1"]
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    block.get_submodule("attentions.0").extra = block.get_submodule("attentions.0.proj_out")
    block.register_parameter("shared", block.get_submodule("attentions.0.proj_out").weight)
    if format is not None:
        quantize_blocks({"down_blocks.1": block}, format)
    before = {name: weight.detach().clone() for name, weight in block.named_parameters()}
    strides = {name: weight.stride() for name, weight in before.items()}
    weights = HostWeights(block, is_pinned=False)
    after = dict(block.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert torch.equal(weight + 0, before[name] + 0), name
        assert weight.stride() == strides[name], name
        assert not weight.requires_grad
    assert block.shared is block.get_submodule("attentions.0.proj_out").weight
    assert weights.buffer.nbytes < 1.1 * sum(w.nbytes for w in before.values())


def test_a_run_without_pinned_memory_says_so(options, run_here, monkeypatch, capsys):
    monkeypatch.setattr(block_offload, "pin", lambda buffer: False)
    original = HostWeights.__init__
    monkeypatch.setattr(
        HostWeights, "__init__", lambda *arguments: original(arguments[0], arguments[1], True)
    )
    assert run_here([*options, *CHECKPOINTED, "--memory.offload_blocks=2"]) == 0
    out = capsys.readouterr().out
    assert "offload     2 of 7 blocks between input and output: " in out
    assert "too little pinned memory" in out


def test_moves_leave_offloaded_weights():
    model = unet()
    blocks = offload(model)
    hosted = {weight for block in blocks for weight in block.host_weights.parameters}
    model.to("meta")
    for weight in model.parameters():
        assert weight.is_meta == (weight not in hosted)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", 0), ("3", 3), ("99", 10), ("all", 10), ("0%", 0), ("1%", 1), ("50%", 5), ("100%", 10)],
)
def test_numbers_and_shares(value, expected):
    assert MemoryConfig(offload_blocks=value).num_offloaded(10) == expected


def test_offloaded_blocks_are_spread():
    numbers = [nn.Linear(1, i + 1) for i in range(10)]
    chosen = [layer.out_features for layer in evenly_spaced(numbers, 3)]
    assert chosen == [2, 6, 9]
    for count in range(11):
        assert len({*evenly_spaced(numbers, count)}) == count


@pytest.mark.parametrize("value", ["some", "-1", "1.5", "150%", "ALL"])
def test_other_values_are_refused(options, run_here, capsys, value):
    assert run_here([*options, f"--memory.offload_blocks={value}"]) == 2
    err = capsys.readouterr().err
    assert "--memory.offload_blocks" in err
    assert "expected a number of blocks, a share such as 50%, or all" in err


def test_blocks_that_keep_activations_cannot_be_offloaded(options, run_here, capsys):
    assert run_here([*options, "--memory.offload_blocks=all"]) == 2
    assert "--memory.offload_blocks all: needs --gradient_checkpointing" in capsys.readouterr().err
