"""FSDP2 shards the base model and keeps adapters whole; checked on one process."""

import os

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from helpers.family_cases import cases, family_of

from common.errors import ConfigError
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from training.checkpoints.storage import tensors_to_bytes
from training.distributed.sharding import blocks_to_shard, shard_base


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.skipif("RANK" in os.environ, reason="is a rank already")
def test_adapters_stay_whole_where_no_prediction_depends_on_them(one_rank):
    """Frozen, but kept: their state is written and read with that of the others."""
    case = next(case for case in cases() if case.family == "qwen_image")
    family = family_of(case)
    denoiser = family.load_denoiser(torch.float32)
    idle = [
        f"{name}.net.2" if name.endswith("mlp") else name for name in family.idle_layers(denoiser)
    ]
    adapted = attach(
        denoiser, dict.fromkeys([*idle, "transformer_blocks.0.attn.to_q"], LayerSpec(2, 2.0)), 0
    )
    for name in family.idle_layers(denoiser):
        denoiser.get_submodule(name).requires_grad_(False)
    assert len(adapted.named_parameters()) == 2 < len(adapted.all_parameters())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    shard_base(plugin, torch.device("cpu"), family, adapted)
    state = adapted.state_dict()
    assert len(tensors_to_bytes(state)) > sum(tensor.nbytes for tensor in state.values())
    adapted.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    assert all(adapted.state_dict()[name].equal(tensor + 1) for name, tensor in state.items())


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_blocks_of_checkpointing_are_sharded_one_by_one(case):
    family = family_of(case)
    denoiser = family.empty_denoiser()
    assert blocks_to_shard(family, denoiser, None) == list(family.blocks(denoiser).values())


def test_the_classes_of_accelerates_config_come_first():
    family = family_of(next(case for case in cases() if case.family == "sdxl"))
    denoiser = family.empty_denoiser()
    blocks = blocks_to_shard(family, denoiser, ["BasicTransformerBlock"])
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}
    with pytest.raises(ConfigError, match="the model has no FluxTransformerBlock"):
        blocks_to_shard(family, denoiser, ["FluxTransformerBlock"])
