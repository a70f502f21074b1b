"""Noise that is not standard normal, and noise levels that are spread over a step."""

import json
import math

import pytest
import torch
from helpers.data_cases import dataset_of
from helpers.project import reset_accelerate
from safetensors.torch import load_file
from torch import Tensor

from data.batches import Batch, MicroBatches, make_batch
from data.schedule import Schedule, random_key
from objectives.config import ObjectiveConfig
from objectives.noise import add_multires_noise, modify_noise, upsampled_variance

SHAPES = {"image": (4, 16, 24), "video": (3, 5, 16, 8), "one pixel": (4, 1, 1)}
OPTIONS = {
    "offset": {"noise_offset": 0.3},
    "multires": {"multires_noise_iterations": 6},
    "input perturbation": {"input_perturbation": 0.1},
    "all": {
        "noise_offset": 0.1,
        "multires_noise_iterations": 3,
        "multires_noise_discount": 0.8,
        "input_perturbation": 0.2,
    },
}


def drawn(shape: tuple[int, ...], seed: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Plain noise, what became of it, and what the denoiser sees."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    return noise, *modify_noise(noise, ObjectiveConfig(**options), generator)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_offset_is_one_number_per_channel(shape):
    differences = []
    for seed in range(300):
        noise, changed, seen = drawn(shape, seed, noise_offset=0.3)
        difference = (changed - noise).flatten(1)
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))
        assert seen is changed
        differences.append(difference[:, 0])
    assert math.isclose(torch.stack(differences).std(), 0.3, rel_tol=0.1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.4), (6, 0.3), (6, 0.9), (16, 1.0)])
def test_multi_resolution_noise_has_variance_1_and_neighbors_that_agree(
    shape, iterations, discount
):
    options = {"multires_noise_iterations": iterations, "multires_noise_discount": discount}
    noise = torch.stack([drawn(shape, seed, **options)[1] for seed in range(1500)])
    assert abs(noise.mean()) < 0.05
    assert math.isclose(noise.var(), 1, abs_tol=0.06)
    if shape[-1] > 1 and iterations > 1 and discount > 0.5:
        apart = (noise[..., 1:] * noise[..., :-1]).mean()
        assert apart > 0.1
        channels = (noise[:, 0] * noise[:, 1]).mean()  # which are drawn apart
        assert abs(channels) < 0.05
    if len(shape) == 4:
        assert abs((noise[:, :, 0] * noise[:, :, 1]).mean()) < 0.05  # and so are frames


@pytest.mark.parametrize(("small", "large"), [(1, 8), (3, 8), (8, 8), (5, 16)])
def test_the_variance_that_enlarging_leaves(small, large):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 1, 1, small, generator=generator)
    enlarged = torch.nn.functional.interpolate(noise, size=(1, large), mode="bilinear")
    assert math.isclose(enlarged.square().mean(), upsampled_variance(small, large), rel_tol=0.03)


def test_input_perturbation_leaves_the_target_its_noise():
    noise, changed, seen = drawn((4, 64, 64), 0, input_perturbation=0.1)
    assert changed.equal(noise)
    extra = (seen - noise) / 0.1
    assert math.isclose(extra.std(), 1, abs_tol=0.02)
    assert abs((extra * noise).mean()) < 0.02


def test_noise_is_not_changed_in_place():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 8, 8, generator=generator)
    before = noise.clone()
    add_multires_noise(noise, 4, 0.9, generator)
    assert noise.equal(before)


@pytest.fixture
def dataset(tmp_path):
    return dataset_of(tmp_path, 5)


def source(dataset, batch_size: int, per_step: int = 1, seed: int = 0, **options) -> MicroBatches:
    schedule = Schedule(dataset.buckets, "f", seed, batch_size)
    return MicroBatches(dataset, schedule, ObjectiveConfig(**options), per_step)


@pytest.mark.parametrize("case", OPTIONS)
def test_noise_is_the_samples_own_whatever_the_batch(dataset, case):
    small, large = (source(dataset, size, **OPTIONS[case]) for size in (1, 4))
    plain = source(dataset, 4)[1]
    batch = large[1]
    for i in range(4):
        single = small[4 + i]
        assert single.noise[0].equal(batch.noise[i])
        if batch.input_noise is not None:
            assert single.input_noise[0].equal(batch.input_noise[i])
    assert (batch.input_noise is not None) == ("input_perturbation" in OPTIONS[case])
    assert batch.latents.equal(plain.latents)
    assert batch.quantile.equal(plain.quantile)
    assert batch.noise.equal(plain.noise) == (case == "input perturbation")
    assert batch.to(torch.device("meta")).noise.is_meta


def test_validation_has_plain_noise(dataset):
    quantile = torch.tensor([0.5])
    batch = make_batch(dataset, [0], [7], range(1), quantile)
    assert batch.input_noise is None
    assert batch.noise[0].equal(torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(7)))


def quantiles_of_step(
    dataset, step: int, ranks: int, accumulation: int, **more
) -> dict[int, float]:
    """visit -> quantile of all samples of a step, as each rank's loader makes them."""
    per_step = ranks * accumulation
    found: dict[int, float] = {}
    for rank in range(ranks):
        batches = source(dataset, 2, per_step, stratified_timesteps=True, **more)
        for turn in range(accumulation):
            batch: Batch = batches[(step * accumulation + turn) * ranks + rank]
            found |= dict(zip(batch.visits, batch.quantile.tolist(), strict=True))
    return dict(sorted(found.items()))


@pytest.mark.parametrize("step", [0, 1, 17])
def test_a_step_has_one_sample_in_each_stratum_on_any_number_of_ranks(dataset, step):
    expected = quantiles_of_step(dataset, step, 1, 4)
    assert quantiles_of_step(dataset, step, 2, 2) == expected
    assert quantiles_of_step(dataset, step, 4, 1) == expected
    assert sorted(int(quantile * 8) for quantile in expected.values()) == list(range(8))
    assert [*expected] == list(range(step * 8, step * 8 + 8))
    assert quantiles_of_step(dataset, step, 1, 4, seed=1) != expected


def test_strata_are_permuted_anew_in_every_step_and_the_place_in_one_is_the_samples_own(dataset):
    orders = {
        tuple(int(8 * q) for q in quantiles_of_step(dataset, step, 1, 4).values())
        for step in range(20)
    }
    assert len(orders) == 20
    plain = source(dataset, 2)[5].quantile
    found = source(dataset, 2, 4, stratified_timesteps=True)[5].quantile.double()
    torch.testing.assert_close(found * 8 - (found * 8).floor(), plain.double(), rtol=0, atol=1e-5)


def test_each_samples_stratified_quantile_is_uniform_over_the_steps(dataset):
    firsts = torch.tensor(
        [quantiles_of_step(dataset, step, 1, 4)[step * 8] for step in range(1500)]
    )
    counts = torch.histc(firsts, 10, 0, 1)
    assert ((counts - 150) ** 2 / 150).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize("visit", [0, 3])
def test_quantiles_of_large_steps_stay_below_one(dataset, visit):
    found = source(dataset, 2, 2**15, stratified_timesteps=True)[visit].quantile
    assert (found < 1).all()
    assert random_key("strata", 0, 0) != random_key("strata", 0, 1)


def test_a_stratified_run_goes_on_where_it_stopped(options, run_here, tmp_path):
    """A run of 3 + 3 steps is one of 6: its samples are the same, and so are its weights."""
    more = [
        *options, "--objective.stratified_timesteps", "--objective.noise_offset=0.1",
        "--objective.input_perturbation=0.1", "--objective.multires_noise_iterations=2",
        "--grad_accumulation_steps=2", "--tracking.log_samples",
    ]  # fmt: skip
    for name, sittings in (("whole", (6,)), ("parts", (3, 6))):
        for steps in sittings:
            reset_accelerate()
            assert run_here([*more, f"--steps={steps}", f"--output_dir={tmp_path / name}"]) == 0
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    logs = [
        [json.loads(row) for row in (run / "sample_log" / "rank_0.jsonl").open()]
        for run in (whole, parts)
    ]
    assert logs[0] == logs[1]
    for step in range(1, 7):
        strata = sorted(int(row["quantile"] * 4) for row in logs[0] if row["step"] == step)
        assert strata == [0, 1, 2, 3]
    tensors = [load_file(run / "lora.safetensors") for run in (whole, parts)]
    assert all(tensor.equal(tensors[1][name]) for name, tensor in tensors[0].items())
