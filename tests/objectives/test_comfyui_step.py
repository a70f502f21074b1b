"""One step of the recipe comfyui_node.yaml is one of ComfyUI's TrainLoraNode, whose formulas stand here on their own.

The node's first values, which our `init` options do not have, and its shapes are put into the adapters. Its training of
LoRA's alpha is left out.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.project import BASE, PROJECT, TWEMOJI
from torch import Tensor, nn
from torch.func import functional_call

from data.batches import Batch
from lora_algos.attach import attach_from_file
from lora_algos.plan import AdapterPlan
from models.detect import get_family
from training.cli import load_config
from training.config import OptimConfig
from training.loss import build_loss
from training.optim.schedule import build_optimizer

SEED, IMAGES, RANK = 5, 3, 4
Tensors = dict[str, Tensor]


def factorization(dim: int, factor: int) -> tuple[int, int]:
    """The node's split of a dimension, the smaller factor first (weight_adapter/base.py)."""
    if dim % factor == 0 and dim >= factor**2:
        return tuple(sorted((factor, dim // factor)))
    m, n, length = 1, dim, dim + 1
    while m < n:
        new_m = m + 1
        while dim % new_m:
            new_m += 1
        new_n = dim // new_m
        if new_m + new_n > length or new_m > factor:
            break
        m, n = new_m, new_n
    return tuple(sorted((m, n)))


def kaiming(shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return tensor


def new_lora(w: Tensor) -> Tensors:
    return {
        "lora_up.weight": kaiming((len(w), RANK)),
        "lora_down.weight": torch.zeros(RANK, w[0].numel()),
    }


def new_loha(w: Tensor) -> Tensors:
    out, fan_in = len(w), w[0].numel()
    return {
        "hada_w1_a": 0.1 + torch.randn(out, RANK), "hada_w1_b": torch.zeros(RANK, fan_in),
        "hada_w2_a": 0.1 + torch.randn(out, RANK), "hada_w2_b": 0.01 + torch.randn(RANK, fan_in),
    }  # fmt: skip


def new_lokr(w: Tensor) -> Tensors:
    (a, b), (c, d) = factorization(w.shape[0], RANK), factorization(w.shape[1], RANK)
    return {"lokr_w1": torch.zeros(a, c), "lokr_w2": kaiming((b, d, *w.shape[2:]))}


def new_oft(w: Tensor) -> Tensors:
    side, blocks = factorization(len(w), RANK)
    return {"oft_blocks": torch.zeros(blocks, side, side)}


def with_lora(w: Tensor, t: Tensors) -> Tensor:
    return w + 1 / RANK * (t["lora_up.weight"] @ t["lora_down.weight"]).reshape(w.shape)


def with_loha(w: Tensor, t: Tensors) -> Tensor:
    first, second = t["hada_w1_a"] @ t["hada_w1_b"], t["hada_w2_a"] @ t["hada_w2_b"]
    return w + 1 / RANK * (first * second).reshape(w.shape)


def with_lokr(w: Tensor, t: Tensors) -> Tensor:
    w1 = t["lokr_w1"].reshape(*t["lokr_w1"].shape, *[1] * (w.ndim - 2))
    return w + torch.kron(w1, t["lokr_w2"]).reshape(w.shape)


def with_oft(w: Tensor, t: Tensors) -> Tensor:
    blocks = t["oft_blocks"]
    q = blocks - blocks.transpose(1, 2)
    norm = (q.square().sum() + 1e-30).sqrt() + 1e-8
    q = q * torch.where(norm > 1.0, 1.0 / norm, 1.0)  # alpha is the constraint
    eye = torch.eye(q.shape[-1])
    r = (eye + q) @ torch.linalg.inv(eye - q)
    parts = w.reshape(*blocks.shape[:2], -1)
    return torch.einsum("knm,kn...->km...", r, parts).reshape(w.shape)


NODE: dict[str, tuple[Callable[[Tensor], Tensors], Callable[[Tensor, Tensors], Tensor]]] = {
    "LoRA": (new_lora, with_lora), "LoHa": (new_loha, with_loha),
    "LoKr": (new_lokr, with_lokr), "OFT": (new_oft, with_oft),
}  # fmt: skip


def draws() -> tuple[int, Tensor, float]:
    """Image, noise and u of the first step, from the global generator as the node draws them."""
    torch.manual_seed(SEED)
    torch.randn(IMAGES, 4, 8, 8)  # the noise that nobody uses
    index = torch.randperm(IMAGES)[:1].item()
    torch.manual_seed(SEED)
    noise = torch.randn(1, 4, 8, 8)
    return index, noise, torch.rand(1).item()


class NodeStep:
    """The node's model, adapters of every weight, norm and bias, and its step, in one dtype."""

    def __init__(self, algorithm: str, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.latents = 5 * torch.randn(IMAGES, 4, 8, 8, generator=generator).to(dtype)
        self.prompts = torch.randn(IMAGES, 24, 96, generator=generator).to(dtype)
        self.make, self.apply = NODE[algorithm]
        self.unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=dtype)
        self.unet.requires_grad_(False)
        self.weights = dict(self.unet.named_parameters())
        torch.manual_seed(1)
        self.adapters: dict[str, Tensors] = {}
        for name, module in self.unet.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None:
                continue
            self.adapters[name] = (
                self.make(weight) if weight.ndim > 1 else {"diff": torch.zeros_like(weight)}
            )
            if bias is not None:
                self.adapters[name]["diff_b"] = torch.zeros_like(bias)
            self.adapters[name] = {key: t.to(dtype) for key, t in self.adapters[name].items()}

    def changed(self) -> Tensors:
        changed = dict(self.weights)
        for name, tensors in self.adapters.items():
            weight = self.weights[f"{name}.weight"]
            difference = tensors.get("diff")
            changed[f"{name}.weight"] = (
                self.apply(weight, tensors) if difference is None else weight + difference
            )
            if "diff_b" in tensors:
                changed[f"{name}.bias"] = self.weights[f"{name}.bias"] + tensors["diff_b"]
        return changed

    def loss(self) -> Tensor:
        index, noise, u = draws()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        log_sigmas = ((1 - alphas) / alphas).sqrt().float().log()
        t = torch.tensor((1.0 - u) * 999.0)
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        sigma = ((1 - w) * log_sigmas[low] + w * log_sigmas[high]).exp()
        timestep = (sigma.log() - log_sigmas).abs().argmin()
        x = (
            self.latents[index : index + 1]
            * AutoencoderKL.load_config(BASE, subfolder="vae")["scaling_factor"]
        )
        xt = x + sigma * noise
        cond = {"encoder_hidden_states": self.prompts[index : index + 1]}
        eps = functional_call(
            self.unet, self.changed(), (xt / (sigma**2 + 1).sqrt(), timestep[None]), cond
        ).sample
        return F.mse_loss((xt - sigma * eps).float(), x.float())

    def step(self) -> tuple[float, dict[str, Tensors]]:
        """The loss and the trained tensors after AdamW's step."""
        before = {
            name: {key: t.clone() for key, t in tensors.items()}
            for name, tensors in self.adapters.items()
        }
        trained = [
            t.requires_grad_() for tensors in self.adapters.values() for t in tensors.values()
        ]
        optimizer = torch.optim.AdamW(trained, lr=5e-4)
        loss = self.loss()
        loss.backward()
        optimizer.step()
        after, self.adapters = self.adapters, before
        return loss.item(), after


def our_step(node: NodeStep, algorithm: str) -> tuple[float, dict[str, Tensors]]:
    """The same step as the recipe takes it, from the same adapters and draws."""
    options = [str(PROJECT / "recipes" / "comfyui_node.yaml"), f"--model.path={BASE}",
               f"--data.path={TWEMOJI / 'train'}", "--training_dtype=fp32", f"--algorithm={algorithm}",
               f"--rank={RANK}"]  # fmt: skip
    config = load_config(options)
    family = get_family(config.model)
    denoiser = family.load_denoiser(node.dtype)
    layers = {
        name: {**tensors, "alpha": torch.tensor(1.0)} for name, tensors in node.adapters.items()
    }
    for tensors in layers.values():
        if "diff" in tensors:
            del tensors["alpha"]
    plan = AdapterPlan(config.adapter, config.algorithm, config.rank, config.bypass_mode)
    adapted = attach_from_file(denoiser, layers, [], plan, family.targets)
    denoiser.to(node.dtype)  # the adapters, which are fp32 in a run
    optimizer = build_optimizer(adapted, config)
    index, noise, u = draws()
    one = torch.ones(1)
    batch = Batch(
        node.latents[index : index + 1], noise.to(node.dtype), torch.tensor([1 - u]),
        {"prompt_embeds": node.prompts[index : index + 1]}, one, torch.zeros(1, 8), range(1),
    )  # fmt: skip
    loss = build_loss(family, config.objective, config.loss_function, node.dtype)(
        denoiser.train(), batch
    ).mean()
    loss.backward()
    assert config.optim == OptimConfig(max_grad_norm=0.0)
    optimizer.step()
    found = {
        name: {key: t.detach() for key, t in layer.trained_tensors().items()}
        for name, layer in adapted.layers().items()
    }
    return loss.item(), found


@pytest.mark.parametrize("algorithm", NODE)
def test_the_loss_in_fp32_is_the_nodes(algorithm):
    node = NodeStep(algorithm, torch.float32)
    ours, _ = our_step(node, algorithm)
    assert math.isclose(ours, node.loss().item(), rel_tol=1e-6)


@pytest.mark.parametrize("algorithm", NODE)
def test_one_step_is_the_nodes(algorithm):
    """Compare in float64, because a few gradients are as small as the rounding of fp32."""
    node = NodeStep(algorithm, torch.float64)
    ours, updated = our_step(node, algorithm)
    loss, expected = node.step()
    assert math.isclose(ours, loss, rel_tol=1e-6)
    assert updated.keys() == expected.keys()
    count = unsure = 0
    for name, tensors in expected.items():
        assert updated[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            apart, gradient = (
                (updated[name][key].reshape(tensor.shape) - tensor).abs(),
                tensor.grad.abs(),
            )
            # AdamW's first step is nearly lr x sign: of gradients that are nothing but rounding it makes whole steps
            sure = (gradient > 1e-5 * gradient.max()) | (gradient == 0)
            assert apart[sure].max() < 5e-6, (name, key)
            count, unsure = count + tensor.numel(), unsure + int((~sure).sum())
    assert unsure < 1e-3 * count
    assert any(
        (tensors["diff_b"] != 0).any() for tensors in updated.values() if "diff_b" in tensors
    )
