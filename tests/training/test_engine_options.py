"""What Accelerate's config and ours may not both say, and what no engine can do."""

import pytest


def test_what_zero_cannot_do_is_refused(options, run_here, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert run_here([*options, "--optim.on_non_finite=skip"]) == 2
    said = capsys.readouterr().err
    assert "zero_stage 3. Use 2, or fsdp2.yaml" in said
    assert "--optim.on_non_finite skip" in said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("FSDP_VERSION=1", "fsdp_version 1. Set it to 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING=true", "--gradient_checkpointing decides"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING=true", "encoders"),
        ("FSDP_AUTO_WRAP_POLICY=NO_WRAP", "the model is sharded by blocks"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "--grad_accumulation_steps decides"),
    ],
)
def test_one_owner_for_each_option(setting, said, options, run_here, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(*setting.split("="))
    assert run_here(options) == 2
    assert said in capsys.readouterr().err


def test_sharding_that_accelerate_does_not_do_on_cpus_is_refused(
    options, run_here, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert run_here(options) == 2
    assert "launched with FSDP, but Accelerate uses" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_text_encoders_are_not_trained_where_nobody_tried_it(
    engine, options, run_here, monkeypatch, capsys
):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert run_here([*options, "--model.train_text_encoder"]) == 2
    assert f"{engine}, which does not support --model.train_text_encoder" in capsys.readouterr().err
