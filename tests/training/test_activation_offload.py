"""Offloaded activations: the same numbers bit for bit, less on the device, nothing left behind."""

import copy
import gc

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.project import BASE
from helpers.runs import assert_same_result
from torch import Tensor, nn

from models.blocks import find_blocks
from training import activation_offload, gradient_checkpointing
from training.activation_offload import ActivationCopier, HostedTensor
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import ACTIVATIONS, HOST

CPU = torch.device("cpu")


@pytest.fixture
def all_sizes(monkeypatch):
    """Tensors of any size are offloaded."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)


def unet(copier: ActivationCopier | None) -> nn.Module:
    model = UNet2DConditionModel.from_pretrained(BASE / "unet").requires_grad_(False).train()
    gradient_checkpointing.apply(model, find_blocks(model, 2), activation_copier=copier)
    return model


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, 96, generator=draw)
    return model(inputs, torch.tensor([5, 500]), text, return_dict=False)[0].square().mean()


def inputs() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, generator=draw).requires_grad_()


def gradient(model: nn.Module) -> Tensor:
    latents = inputs()
    loss_of(model, latents).backward()
    assert latents.grad is not None
    return latents.grad


def alive(copier: ActivationCopier) -> list[HostedTensor]:
    """The activations on the host."""
    references = [reference for block in copier.blocks for reference in block]
    return [reference() for reference in references if reference() is not None]


def counted_step(model: nn.Module) -> LiveBytes:
    live_bytes = LiveBytes()
    live_bytes.label([*model.parameters(), *model.buffers()], "base")
    with live_bytes:
        gradient(model)
    return live_bytes


def test_activations_wait_on_the_host(all_sizes):
    plain, copier = unet(None), ActivationCopier(CPU)
    offloaded = unet(copier)
    assert torch.equal(gradient(plain), gradient(offloaded))
    before, after = counted_step(plain), counted_step(offloaded)
    assert after.at_peak[HOST] > 0
    assert after.at_peak[ACTIVATIONS] < 0.9 * before.at_peak[ACTIVATIONS]
    assert after.peak < before.peak
    assert after.current[HOST] == 0
    assert not alive(copier)


def test_a_pass_without_backward_leaves_nothing(all_sizes):
    copier = ActivationCopier(CPU)
    model = unet(copier)
    loss = loss_of(model, inputs())
    assert len(alive(copier)) > 5
    del loss
    gc.collect()
    assert not alive(copier)
    first, second = gradient(model), gradient(model)
    assert torch.equal(first, second)
    assert not alive(copier)
    assert len(copier.blocks) <= 1


def test_small_and_shared_tensors_stay(monkeypatch):
    copier = ActivationCopier(CPU)
    loss = loss_of(unet(copier), inputs())
    assert not alive(copier)  # all are small
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    with torch.no_grad():
        loss_of(unet(copier), inputs())
    assert not alive(copier)
    loss.backward()


class TwoInputs(nn.Module):
    """A block that gets two activations, one of which all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.first(x) + y * shared), self.second(y)


def test_blocks_with_several_inputs_are_copied_a_block_ahead(all_sizes, monkeypatch):
    torch.manual_seed(0)
    copier = ActivationCopier(CPU)
    blocks = nn.ModuleList(TwoInputs() for _ in range(4))
    plain = copy.deepcopy(blocks)
    named = {str(number): block for number, block in enumerate(blocks)}
    gradient_checkpointing.apply(blocks, named, activation_copier=copier)
    begun = []
    original = copier.side_stream.to_device
    monkeypatch.setattr(
        copier.side_stream, "to_device", lambda host: begun.append(1) or original(host)
    )

    def gradients(layers: nn.ModuleList) -> list[Tensor]:
        torch.manual_seed(1)
        x, y, shared = (torch.randn(2, 8).requires_grad_() for _ in range(3))
        first, second, shared_scale = x * 2, y * 2, shared * 2
        for layer in layers:
            first, second = layer(first, second, shared_scale)
        (first.sum() + second.sum()).backward()
        return [x.grad, y.grad, shared.grad]

    offloaded = gradients(blocks)
    assert all(torch.equal(a, b) for a, b in zip(offloaded, gradients(plain), strict=True))
    # two activations of each block; the shared one is kept once, and copied for each block
    assert 2 * 4 + 1 <= len(begun) <= 2 * 4 + 4
    assert not alive(copier)


@pytest.mark.parametrize("policy", ["full", "keep-attention-output"])
def test_a_run_is_the_same_bit_for_bit(options, run_here, tmp_path, all_sizes, policy):
    offload = ["--memory.offload_activations", "--memory.offload_blocks=3"]
    plain, offloaded = tmp_path / "plain", tmp_path / "offloaded"
    for folder, more in ((plain, []), (offloaded, offload)):
        run = [
            *options,
            "--gradient_checkpointing",
            f"--checkpoint_policy={policy}",
            "--adapter.dropout=0.1",
        ]
        assert run_here([*run, *more, f"--output_dir={folder}"]) == 0
    assert_same_result(plain, offloaded)


def test_it_needs_checkpointing(options, run_here, capsys):
    assert run_here([*options, "--memory.offload_activations"]) == 2
    assert "--memory.offload_activations: needs --gradient_checkpointing" in capsys.readouterr().err
