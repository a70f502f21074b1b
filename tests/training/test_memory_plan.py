"""The planned memory of a run is the memory that the run takes: real steps on the CPU, counted tensor by tensor."""

import pytest
import torch
from helpers.family_cases import SIDE, Case, cases, folder_of
from helpers.memory_counts import TOLERANCE, assert_planned, planner_of
from helpers.project import write_animations

from lora_algos import ALGORITHMS
from training import activation_offload
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import IMAGES, VAE

LONG_CAPTION = "a cat and a dog " * 200
"""More tokens than any text encoder here reads."""

OTHER_SAMPLES = {
    "qwen_image_edit": "plans control images of a million pixels, which tests make smaller",
    "qwen_image_edit_plus": "plans control images of a million pixels, which tests make smaller",
    "z_image_omni": "plans a control image of a million pixels; test_z_image_omni.py has a smaller one",
    "qwen_image_21": "plans 1024 tokens, and cuts no caption",
    "ideogram4": "plans 2048 tokens, more than the caption here has",
    "hunyuan_video15": "plans texts in quotes, which the caption here lacks",
}
"""Families -> why the samples of these tests are not those of their plan."""


PLAIN = ()
CHANGES = [
    PLAIN,
    ("--training_dtype=bf16", "--gradient_checkpointing"),
    ("--gradient_checkpointing", "--checkpoint_depth=2", "--grad_accumulation_steps=2"),
    ("--gradient_checkpointing", "--checkpoint_blocks=3", "--ema.decay=0.9"),
    ("--gradient_checkpointing", "--checkpoint_policy=keep-attention-output", "--rank=64"),
    ("--model.quantization=int8", "--training_dtype=bf16"),
    ("--model.quantization=nf4", "--gradient_checkpointing"),
    ("--optimizer=SGD", "--batch_size=1"),
    ("--gradient_checkpointing", "--memory.offload_blocks=all", "--memory.offload_activations"),
    (
        "--gradient_checkpointing",
        "--memory.offload_blocks=3",
        "--checkpoint_depth=2",
        "--model.quantization=nf4",
    ),
]


@pytest.fixture(autouse=True)
def small_activations(monkeypatch):
    """Activations of tiny models are offloaded too."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1024)


SHORT = (0, 2, 6, 8)
"""Places in CHANGES of what make test plans; make test-long plans all."""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, marks=() if place in SHORT else pytest.mark.long)
        for place, changes in enumerate(CHANGES)
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_a_step_takes_the_planned_memory(options, run_here, changes):
    assert_planned(run_here, [*options, *changes])


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_of_every_algorithm_takes_the_planned_memory(
    options, run_here, algorithm, quantization
):
    more = [
        f"--algorithm={algorithm}",
        f"--model.quantization={quantization}",
        "--gradient_checkpointing",
    ]
    assert_planned(run_here, [*options, "--training_dtype=bf16", *more])


@pytest.mark.long
@pytest.mark.parametrize(
    "optimizer", ["Adam", "RMSprop", "Adafactor", "Muon", "Lion", "CAME", "ScheduleFreeAdamW"]
)
def test_a_step_of_other_optimizers_takes_the_planned_memory(options, run_here, optimizer):
    assert_planned(run_here, [*options, f"--optimizer={optimizer}"])


@pytest.mark.long
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_step_of_every_family_takes_the_planned_memory(
    options, run_here, case: Case, images, controls, tmp_path
):
    if case.family in OTHER_SAMPLES:
        pytest.skip(OTHER_SAMPLES[case.family])
    for path in images.glob("*.txt"):
        path.write_text(LONG_CAPTION)
    more = [f"--model.path={folder_of(case)}", f"--data.resolution={SIDE}", "--no_bucket_mode"]
    more += case.options
    if case.controls:
        more += ["--data.control_paths", *map(str, controls[: case.controls])]
    if case.first_frame:
        more += [f"--data.path={write_animations(tmp_path / 'clips')}", "--data.frames=5"]
    # the counted step does not make the tables of positions, which some models make once and keep
    assert_planned(run_here, [*options, *more, "--gradient_checkpointing"], tolerance=0.04)


def test_encoding_images_takes_the_planned_memory(options):
    planner = planner_of(options)
    planned = planner.trace([IMAGES], {})[0].total
    encoders = planner.family.load_encoders("media")
    live_bytes = LiveBytes()
    live_bytes.label(encoders.vae.parameters(), VAE)
    with torch.no_grad(), live_bytes:
        planner.family.encode_media(encoders, torch.zeros(8, 3, 64, 64))
    assert planned == pytest.approx(live_bytes.peak, rel=TOLERANCE)
