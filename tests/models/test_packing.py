"""Packed latents and positions against diffusers' own."""

import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline

from models.families.packing import image_ids, pack, unpack

SHAPES = pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 8), (3, 16, 10, 2)], ids=str)
CPU = torch.device("cpu")


@SHAPES
def test_cells_are_packed_as_flux_packs_them_and_come_back(shape):
    latents = torch.randn(shape)
    tokens = pack(latents)
    assert tokens.equal(FluxPipeline._pack_latents(latents, *shape))
    assert unpack(tokens, *shape[2:]).equal(latents)
    assert unpack(tokens, *shape[2:]).equal(
        FluxPipeline._unpack_latents(tokens, shape[2], shape[3], 1)
    )


@SHAPES
def test_single_cells_are_packed_as_flux2_packs_them_and_come_back(shape):
    latents = torch.randn(shape)
    tokens = pack(latents, patch=1)
    assert tokens.equal(Flux2Pipeline._pack_latents(latents))
    assert unpack(tokens, *shape[2:], patch=1).equal(latents)


@SHAPES
def test_positions_are_those_of_diffusers(shape):
    height, width = shape[2:]
    assert image_ids(height, width, CPU).equal(
        FluxPipeline._prepare_latent_image_ids(1, height, width, CPU, torch.float32)
    )
    four = Flux2Pipeline._prepare_latent_ids(torch.empty(shape))[0]
    assert image_ids(height, width, CPU, axes=4).equal(four.float())
