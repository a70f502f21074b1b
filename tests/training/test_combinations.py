"""Algorithm x quantization x offload x checkpointing: each run equals the plain one bit for bit, or is refused.

The plain run of an algorithm and a quantization has everything on the device and computes nothing twice. `make test`
takes two rows of the table per algorithm, `make test-long` the whole table, where each run is resumed too.
"""

import itertools

import pytest
from helpers.runs import assert_same_result

from lora_algos import ALGORITHMS
from models.quantization import FORMATS
from training import activation_offload

QUANTIZATIONS = ["none", *FORMATS]
OFFLOADS = {
    "resident": [],
    "blocks": ["--memory.offload_blocks=all"],
    "some-blocks": ["--memory.offload_blocks=40%"],
    "activations": ["--memory.offload_activations", "--memory.offload_blocks=2"],
}
CHECKPOINTS = {
    "depth-1": ["--checkpoint_depth=1"],
    "depth-2": ["--checkpoint_depth=2", "--checkpoint_policy=keep-attention-output"],
    "first-blocks": ["--checkpoint_blocks=4"],
}
TABLE = list(itertools.product(ALGORITHMS, QUANTIZATIONS, OFFLOADS, CHECKPOINTS))


def short_table() -> list[tuple[str, str, str, str]]:
    """Two rows per algorithm, which have each pair of the other values in different rows."""
    others = list(itertools.product(QUANTIZATIONS, OFFLOADS, CHECKPOINTS))
    rows = []
    for number in range(2 * len(ALGORITHMS)):
        algorithm = list(ALGORITHMS)[number // 2]
        rows.append((algorithm, *others[number * 19 % len(others)]))
    return rows


@pytest.fixture(autouse=True)
def small_activations(monkeypatch):
    """Activations of a tiny model are offloaded too."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)


def options_of(algorithm: str, quantization: str) -> list[str]:
    base = [f"--algorithm={algorithm}", f"--model.quantization={quantization}", "--steps=3"]
    return [*base, "--training_dtype=bf16", "--tracking.log_every=1"]


@pytest.mark.parametrize(("algorithm", "quantization", "offload", "checkpoints"), short_table())
def test_a_row_of_the_table(run_into, algorithm, quantization, offload, checkpoints):
    base = options_of(algorithm, quantization)
    saving = ["--gradient_checkpointing", *OFFLOADS[offload], *CHECKPOINTS[checkpoints]]
    assert_same_result(run_into("plain", *base), run_into("saving", *base, *saving))


@pytest.mark.long
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_whole_table(run_into, algorithm, quantization):
    base = options_of(algorithm, quantization)
    plain = run_into("plain", *base)
    for offload, checkpoints in itertools.product(OFFLOADS, CHECKPOINTS):
        saving = ["--gradient_checkpointing", *OFFLOADS[offload], *CHECKPOINTS[checkpoints]]
        name = f"{offload} {checkpoints}"
        run_into(name, *base, *saving, "--steps=2")
        assert_same_result(plain, run_into(name, *base, *saving))


def test_the_short_table_has_every_value():
    columns = [set(column) for column in zip(*short_table(), strict=True)]
    assert columns == [set(column) for column in zip(*TABLE, strict=True)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compile=blocks", "--model.quantization=int8"], "does not work with --model.quantization"),
        (["--memory.offload_blocks=2", "--no_gradient_checkpointing"], "needs --gradient_checkpointing"),
        (["--memory.offload_activations", "--no_gradient_checkpointing"], "needs --gradient_checkpointing"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, run_here, capsys, more, message):
    assert run_here([*options, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_sharding_refuses_offloaded_blocks(options, run_here, capsys, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    more = ["--gradient_checkpointing", "--memory.offload_blocks=2"]
    assert run_here([*options, *more]) == 2
    assert f"{engine}, which does not support --memory.offload_blocks" in capsys.readouterr().err
