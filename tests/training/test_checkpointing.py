"""Gradient checkpointing at every depth and policy: the same gradients bit for bit, less memory, the same tree."""

import copy
import io
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from helpers.project import BASE
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.checkpointing import new_bytes
from common.errors import ModelError
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.targets import adaptable_layers
from models.blocks import find_blocks
from training import gradient_checkpointing
from training.config import TrainConfig
from training.memory.phase_memory import ACTIVATIONS
from training.run_folder import CHANGEABLE_OPTIONS

FULL, KEPT = "full", "keep-attention-output"
VARIANTS = [(depth, policy) for depth in range(1, 6) for policy in (FULL, KEPT)]
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def unet() -> nn.Module:
    return UNet2DConditionModel.from_pretrained(BASE / "unet").train()


def flux() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    return FluxTransformer2DModel(
        **sizes,
        in_channels=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).train()


def forward(model: nn.Module, run: nn.Module | None = None) -> torch.Tensor:
    """A loss of inputs that need no gradient, under a fixed seed for what is random inside; `run` wraps the model."""
    run = model if run is None else run
    draw = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    torch.manual_seed(2)
    if isinstance(model, FluxTransformer2DModel):
        given = {"encoder_hidden_states": randn(2, 5, 32), "pooled_projections": randn(2, 32)}
        ids = {"img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(5, 3)}
        out = run(
            randn(2, 16, 4), timestep=torch.tensor([0.3, 0.8]), **given, **ids, return_dict=False
        )
    else:
        out = run(randn(2, 4, 8, 8), torch.tensor([5, 500]), randn(2, 7, 96), return_dict=False)
    return out[0].square().mean()


def gradients(model: nn.Module, run: nn.Module | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    forward(model, run).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA on all layers, with updates that are not zero."""
    attach(model, dict.fromkeys(adaptable_layers(model), LayerSpec(4, 4.0)), 0)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def with_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


def saved_bytes(model: nn.Module) -> int:
    """What autograd keeps for the backward pass, beside parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)
    return sum(storage.nbytes() for storage in kept.values())


def live_bytes(model: nn.Module) -> int:
    """What lives after the forward pass, kept by whomever."""
    with new_bytes([*model.parameters(), *model.buffers()]) as live:
        loss = forward(model)
        now = live.current[ACTIVATIONS]
    del loss
    return now


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def attentions(model: nn.Module) -> int:
    with OpCounter() as counter:
        forward(model).backward()
    return counter.counts[ATTENTION]


def apply(
    model: nn.Module, depth: int, policy: str = "full", max_blocks: int | None = None
) -> list[str]:
    """Checkpoint the blocks of a model at a depth."""
    blocks = gradient_checkpointing.first_blocks(find_blocks(model, depth), max_blocks)
    gradient_checkpointing.apply(model, blocks, policy)
    return list(blocks)


@pytest.mark.parametrize("make", [unet, flux])
@pytest.mark.parametrize(
    "change", [lambda m: m, with_lora, with_dropout], ids=["trained whole", "adapter", "dropout"]
)
def test_gradients_are_the_same_bit_for_bit(make, change):
    model = change(make())
    wanted = gradients(model)
    assert wanted
    for depth, policy in VARIANTS:
        apply(model, depth, policy)
        assert equal(wanted, gradients(model)), (depth, policy)


def test_dropout_draws_anew_in_every_step():
    model = with_dropout(unet())
    apply(model, 1)
    first = forward(model)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        state = torch.get_rng_state()
        first.backward()
        assert torch.equal(
            state, torch.get_rng_state()
        )  # the backward pass leaves the generator alone


@pytest.mark.parametrize("make", [unet, flux])
def test_adapters_attach_before_and_after(make):
    before, after = make(), make()
    apply(before, 3)
    names = apply(with_lora(after), 3)
    with_lora(before)
    assert names == [
        n for n, m in before.named_modules() if isinstance(m, gradient_checkpointing.Checkpointed)
    ]
    assert equal(gradients(before), gradients(after))


def test_memory_falls_and_attention_outputs_cost_little():
    model = with_lora(unet())
    saved, live = saved_bytes(model), live_bytes(model)
    lives = {}
    for depth, policy in VARIANTS:
        apply(model, depth, policy)
        assert saved_bytes(model) < saved / 2
        lives[depth, policy] = live_bytes(model)
    for depth in range(1, 6):
        assert (
            lives[depth, FULL] < lives[depth, KEPT] < lives[depth, FULL] + 0.1 * live < 0.6 * live
        )
    assert lives[1, FULL] < 0.15 * live
    assert [lives[depth, FULL] for depth in range(1, 6)] == sorted(
        lives[depth, FULL] for depth in range(1, 6)
    )


def test_each_block_that_is_not_checkpointed_costs_memory():
    model = with_lora(flux())
    wanted = gradients(model)
    names = apply(model, 1)
    live = [live_bytes(model)]
    for count in range(len(names) - 1, 0, -1):
        assert apply(model, 1, max_blocks=count) == names[:count]
        assert equal(wanted, gradients(model))
        live.append(live_bytes(model))
    assert live == sorted(live)
    assert live[0] < 0.5 * live[-1]
    assert apply(model, 1, max_blocks=100) == names


def test_the_first_blocks_are_checkpointed_because_the_peak_is_lowest_then():
    model = with_lora(flux())
    blocks = find_blocks(model, 1)
    half = len(blocks) // 2
    peaks = []
    for order in (blocks, dict(reversed(blocks.items()))):
        gradient_checkpointing.apply(model, gradient_checkpointing.first_blocks(order, half))
        with new_bytes([*model.parameters(), *model.buffers()]) as live:
            forward(model).backward()
        peaks.append(live.at_peak[ACTIVATIONS])
    first, last = peaks
    assert first < last


@pytest.mark.parametrize("make", [unet, flux])
def test_kept_attention_is_not_computed_again(make):
    model = make()
    once = attentions(model)
    assert once > 3
    for depth in range(1, 6):
        apply(model, depth, KEPT)
        assert attentions(model) == once
        apply(model, depth, FULL)
        assert attentions(model) == 2 * once


def test_the_math_backend_recomputes_and_is_right():
    model = unet()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradients(model)
        apply(model, 1, KEPT)
        assert attentions(model) == 0
        assert equal(wanted, gradients(model))


@pytest.mark.parametrize("make", [unet, flux])
@pytest.mark.parametrize("depth", range(1, 6))
def test_the_module_tree_stays_as_it_was(make, depth):
    plain, model = make(), make()
    names = apply(model, depth)
    assert names
    assert list(plain.state_dict()) == list(model.state_dict())
    assert list(adaptable_layers(plain)) == list(adaptable_layers(model))
    pairs = list(zip(plain.named_modules(), model.named_modules(), strict=True))
    assert all(
        a == b and isinstance(n, type(m)) and type(n).__name__ == type(m).__name__
        for (a, m), (b, n) in pairs
    )
    assert not any(a != b and b.startswith(f"{a}.") for a in names for b in names), (
        "one inside another"
    )
    classes = {type(model.get_submodule(name)) for name in names}
    assert len(classes) == len(
        {cls.original for cls in classes}
    )  # equal blocks still have one class
    gradient_checkpointing.remove(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]


def test_depth_counts_blocks_and_ends_at_the_deepest():
    def kinds(model: nn.Module, depth: int) -> set[str]:
        return {type(model.get_submodule(name)).__name__ for name in apply(model, depth)}

    model = unet()
    ever = {"TimestepEmbedding"}
    down_and_up = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    assert kinds(model, 1) == down_and_up | ever | {"UNetMidBlock2DCrossAttn"}
    assert kinds(model, 2) == {"ResnetBlock2D", "Transformer2DModel"} | ever
    assert kinds(model, 3) == {"ResnetBlock2D", "BasicTransformerBlock"} | ever
    assert (
        kinds(model, 4) == kinds(model, 5) == {"ResnetBlock2D", "Attention", "FeedForward"} | ever
    )
    assert {"FluxTransformerBlock", "FluxSingleTransformerBlock"} <= kinds(flux(), 1)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ModelError, match="no_gradient_checkpointing"):
        apply(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 1)


def test_diffusers_own_checkpointing_is_not_nested():
    model = unet()
    model.enable_gradient_checkpointing()
    apply(model, 1)
    assert not model.is_gradient_checkpointing
    assert attentions(model) == 2 * attentions(unet())


class Odd(nn.Module):
    """Takes and gives what is no tensor, and tensors in a tuple and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, pair, debug=None, *, extra, scale=1.0, name="x"):
        x, nothing = pair
        assert nothing is None
        y = self.b(torch.relu(self.a(x)) * extra["y"]) * scale
        return {"y": y, "name": name, "debug": debug}, (y.sum(), None)


def test_any_inputs_and_outputs_pass():
    torch.manual_seed(0)
    model = nn.ModuleDict({"odd": Odd()})
    assert apply(model, 1) == ["odd"]
    x = torch.randn(2, 3, requires_grad=True)
    wanted = []
    for _ in range(2):
        x.grad = None
        out, (total, nothing) = model["odd"](
            (x, None), True, extra={"y": x * 2}, scale=3.0, name="z"
        )
        total.backward()
        assert (out["name"], out["debug"], nothing) == ("z", True, None)
        wanted.append((out["y"].detach(), x.grad))
        gradient_checkpointing.remove(model)
    assert all(torch.equal(a, b) for a, b in zip(*wanted, strict=True))


def test_copies_and_regional_compilation_see_plain_modules():
    model = unet()
    apply(model, 3, KEPT)
    assert equal(gradients(model), gradients(copy.deepcopy(model)))
    assert any(isinstance(m, BasicTransformerBlock) for m in model.modules())


def test_without_gradients_nothing_is_checkpointed(monkeypatch):
    model = unet()
    apply(model, 1)
    monkeypatch.setattr(gradient_checkpointing, "checkpoint", None)
    with torch.no_grad():
        forward(model)
    with pytest.raises(TypeError):
        forward(model)


def test_pipelines_and_saving_work(tmp_path):
    model = unet()
    with torch.no_grad():
        plain = forward(model)
    apply(model, 1, KEPT)
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plain, forward(again.train()))
    parts = {"safety_checker": None, "requires_safety_checker": False, "torch_dtype": torch.float32}
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, unet=model, **parts)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(
        "a cat", num_inference_steps=1, height=64, width=64, output_type="np"
    ).images.shape == (
        1,
        64,
        64,
        3,
    )
    torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize("policy", [FULL, KEPT])
def test_compiles_without_a_break(policy):
    torch._dynamo.reset()
    model = flux()
    wanted = gradients(model)
    apply(model, 1, policy)
    compiled = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(wanted[name], compiled[name], atol=1e-6) for name in wanted)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", [FULL, KEPT])
def test_ddp(one_rank, policy):
    model = with_lora(flux())
    wanted = gradients(model)
    apply(model, 1, policy)
    assert equal(wanted, gradients(model, DistributedDataParallel(model)))


@pytest.mark.parametrize("policy", [FULL, KEPT])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fsdp2(one_rank, policy):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded = []
    for checkpoint in (False, True):
        model = with_lora(flux())
        names = apply(model, 1, policy)
        if not checkpoint:
            gradient_checkpointing.remove(model)
        for name in names:
            fully_shard(model.get_submodule(name), mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded.append({name: grad.full_tensor() for name, grad in gradients(model).items()})
    assert equal(*sharded)


def test_the_options_change_nothing_that_is_learned():
    assert {"gradient_checkpointing", "checkpoint_depth", "checkpoint_policy"} <= CHANGEABLE_OPTIONS
    assert (TrainConfig().checkpoint_depth, TrainConfig().checkpoint_policy) == (1, FULL)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], False),
        (["--adapter.dropout=0.1"], True),
        (["--adapter.rank_dropout=0.1"], True),
        (["--adapter.module_dropout=0.1"], True),
    ],
)
def test_random_states_are_kept_only_for_dropouts(more, expected, options, run_here, monkeypatch):
    """On a GPU each block would ask for the state of its random generator."""
    states = []
    original = torch.get_rng_state
    monkeypatch.setattr(
        torch.utils.checkpoint.torch, "get_rng_state", lambda: states.append(1) or original()
    )
    assert run_here([*options, "--gradient_checkpointing", "--steps=1", *more]) == 0
    # without a dropout, adapters are attached with one copy of it
    assert (len(states) > 1) is expected


def test_a_dropout_of_the_base_model_keeps_random_states():
    from helpers.tiny_models import clip_encoder

    assert not gradient_checkpointing.has_active_dropout(nn.Sequential(nn.Dropout(0.0)))
    assert gradient_checkpointing.has_active_dropout(nn.Sequential(nn.Dropout(0.1)))
    assert gradient_checkpointing.has_active_dropout(nn.Sequential(nn.AlphaDropout(0.1)))
    encoder = clip_encoder()
    assert not gradient_checkpointing.has_active_dropout(encoder)
    for module in encoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5  # attention_dropout of its config
    assert gradient_checkpointing.has_active_dropout(encoder)


@pytest.mark.parametrize(
    ("more", "count"), [([], 8), (["--checkpoint_blocks=3"], 3), (["--checkpoint_blocks=99"], 8)]
)
def test_the_summary_says_how_many_blocks_are_recomputed(more, count, options, run_here, capsys):
    assert run_here([*options, "--steps=1", "--gradient_checkpointing", *more]) == 0
    assert f"blocks      {count} of 8 are recomputed" in capsys.readouterr().out
