"""A GPU that is too small ends a run with what takes less memory, as the run is configured."""

import pytest
import torch

from data.precompute import encode, encode_captions
from training.distributed.engine import Engine
from training.memory.phase_watch import PhaseWatch


def full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def advice(capsys) -> str:
    said = capsys.readouterr().err
    after = said.split(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.\n"
    )[-1]
    (line,) = [line for line in after.splitlines() if line.startswith("To use less memory")]
    return line


STEPS = {
    "as the tests run": (
        ["--batch_size=6", "--grad_accumulation_steps=2"],
        ["--gradient_checkpointing, ", "--batch_size 3 --grad_accumulation_steps 4 (now 6 and 2)",
         "--training_dtype bf16", "--data.resolution below 64", "accelerate_configs/fsdp2.yaml",
         "--model.quantization nf4 in a new --output_dir (now none)"],
        [],
    ),
    "an odd batch": (["--batch_size=3"], ["--batch_size 1 --grad_accumulation_steps 3 (now 3 and 1)"], []),
    "blocks inside the blocks": (
        ["--gradient_checkpointing", "--checkpoint_depth=2"],
        ["--checkpoint_depth 1 if the model is a transformer (now 2)"],
        ["--gradient_checkpointing,"],
    ),
    "some blocks only": (
        ["--gradient_checkpointing", "--checkpoint_blocks=3"],
        ["--checkpoint_blocks None (now 3)"],
        ["--gradient_checkpointing,"],
    ),
    "with what can be had": (
        ["--batch_size=1", "--gradient_checkpointing", "--training_dtype=bf16", "--model.quantization=nf4"],
        ["--data.resolution below 64"],
        ["--gradient_checkpointing", "--checkpoint_depth", "--checkpoint_blocks", "--batch_size", "--training_dtype",
         "--model.quantization", "fsdp2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_does_not_fit_says_what_takes_less(
    case, options, run_here, monkeypatch, capsys
):
    more, said, unsaid = STEPS[case]
    monkeypatch.setattr(Engine, "backward", full)
    assert run_here([*options, *more]) == 1
    line = advice(capsys)
    assert not [words for words in said if words not in line], line
    assert not [words for words in unsaid if words in line], line
    assert "encode_batch_size" not in line


def test_the_phase_and_its_plan_are_named(options, run_here, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "backward", full)
    assert run_here(options) == 1
    assert "The GPU's memory ran out in the phase `train`" in capsys.readouterr().err
    watch = PhaseWatch(torch.device("cpu"))
    watch.planned["validate"] = 3 * 2**30
    with (
        pytest.raises(torch.OutOfMemoryError) as caught,
        watch.phase("train"),
        watch.phase("validate"),
    ):
        full()
    assert caught.value.__notes__ == [
        "The GPU's memory ran out in the phase `validate`; planned 3.0 GiB"
    ]


def test_a_sharded_run_is_not_told_to_shard(monkeypatch):
    from training.config import TrainConfig
    from training.distributed.failures import describe_error

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = describe_error(torch.OutOfMemoryError("full"), TrainConfig())
    assert "--data.resolution below 512" in said
    assert "fsdp2" not in said
    assert "--model.quantization" not in said


@pytest.mark.parametrize("size", [8, 1])
def test_encoding_that_does_not_fit_says_so(size, options, run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "encode_batch", full)
    fresh = [*options, f"--data.cache_dir={tmp_path / 'cache'}", f"--data.encode_batch_size={size}"]
    assert run_here(fresh) == 1
    line = advice(capsys)
    assert ("--data.encode_pixels 4096 (now 1048576)" in line) == (size == 8)
    assert "--model.vae_dtype bf16, or --model.vae_tiling" in line
    assert "--data.resolution below 64" in line
    assert "export-dataset" in line
    assert "--grad_accumulation_steps" not in line


def test_options_that_are_set_are_not_advised(options, run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "encode_batch", full)
    fresh = [
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--model.vae_dtype=bf16",
        "--model.vae_tiling",
    ]
    assert run_here([*options, *fresh]) == 1
    line = advice(capsys)
    assert "--model" not in line


def test_captions_that_do_not_fit_say_so(options, run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode_captions, "encode_texts", full)
    assert run_here([*options, f"--data.cache_dir={tmp_path / 'cache'}"]) == 1
    line = advice(capsys)
    assert "--data.encode_batch_size 4 (now 8), or --model.text_encoder_placement layers" in line
    assert "--data.encode_pixels" not in line
