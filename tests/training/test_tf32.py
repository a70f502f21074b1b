"""A run with TF32 writes the files that a run without it writes. TF32 is imitated on the CPU."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.precision import exact_products
from lora_algos.layer_op import LayerOp
from lora_algos.oft import BlockRotation
from lora_algos.prepared import prepare
from training import export

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)
KEPT_BITS = 10
"""Bits of the mantissa of a TF32 number."""


def rounded(value: object) -> object:
    """Return an fp32 tensor as TF32 reads it."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    mantissa, exponent = torch.frexp(value)
    scale = 2.0 ** (KEPT_BITS + 1)
    return torch.ldexp((mantissa * scale).round() / scale, exponent)


class ImitatedTf32(TorchDispatchMode):
    """Rounds the inputs of matrix products, if the setting for GPUs says so."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_on = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if is_on and func.overloadpacket in PRODUCTS:
            args = tuple(rounded(value) for value in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32():
    earlier = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with ImitatedTf32():
        yield
    torch.backends.cuda.matmul.fp32_precision = earlier


def test_products_are_rounded_outside_of_the_block(tf32):
    """So that the other tests can fail."""
    matrix = torch.full((2, 2), 1 + 2**-12)
    assert (matrix @ matrix)[0, 0] == 2
    with exact_products():
        assert (matrix @ matrix)[0, 0] > 2
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("algorithm", ["LoRA", "DoRA", "OFT"])
def test_the_adapter_is_written(algorithm, options, run_here, tmp_path, monkeypatch):
    """With a scaling that rounds: the file and the adapter are compared by products."""
    original = export.RunExport.write

    def write(*arguments):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with ImitatedTf32():
            original(*arguments)

    monkeypatch.setattr(export.RunExport, "write", write)
    scaling = ["--rank=12", "--adapter.alpha=7", "--export.formats", "kohya"]
    if algorithm == "LoRA":
        scaling += ["diffusers"]
    assert run_here([*options, f"--algorithm={algorithm}", *scaling]) == 0
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_a_prepared_rotation_is_orthogonal(tf32):
    blocks = torch.randn(1, 16, 16)
    kernel = BlockRotation(LayerOp(0), torch.Size((16, 16)), 1.0)
    (change,) = prepare(kernel, torch.empty(16, 16), (blocks,), torch.float32)
    with exact_products():
        rotation = change + torch.eye(16)
        error = (rotation @ rotation.mT - torch.eye(16)).abs().max()
    assert error < 1e-5
