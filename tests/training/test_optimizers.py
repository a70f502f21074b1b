"""The optimizers by name: each learns, resumes bit for bit, skips what is not finite, on any number of processes; and
what they are told is checked before anything is encoded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.project import PROJECT, RANKS, TWEMOJI
from helpers.runs import assert_same_adapter, counted_run, launched, runs_file
from safetensors.torch import load_file

from training.optim.muon import MuonAdamW
from training.optim.registry import NODE_OPTIMIZERS, OPTIMIZERS, OTHER_OPTIMIZERS
from training.optim.schedule import SkipNonFinite

# a learning rate with which the loss falls in twelve steps, and what else is to be tried
TOLD = {
    "AdamW": "1e-2 amsgrad=true",
    "Adam": "1e-2",
    "SGD": "0.1 momentum=0.9 nesterov=true",
    "RMSprop": "2e-3 momentum=0.5",
    "AdamW8bit": "1e-2 min_8bit_size=16",
    "PagedAdamW": "1e-2",
    "PagedAdamW8bit": "1e-2 min_8bit_size=16",
    "Lion8bit": "2e-3 min_8bit_size=16",
    "PagedLion8bit": "2e-3 min_8bit_size=16",
    "Prodigy": "1 d_coef=2 d0=1e-3 use_bias_correction=true",
    "Lion": "2e-3",
    "ScheduleFreeAdamW": "2e-2 r=0.5",
    "ScheduleFreeSGD": "1 momentum=0.8",
    "CAME": "1e-3 betas=[0.9,0.99,0.999]",
    "Adafactor": "1e-2 beta1=0.9",
    "Muon": "1e-2 momentum=0.9",
}
HERE = [name for name, source in OPTIMIZERS.items() if source.extra != "bitsandbytes"]
SIMILAR = ("Adam", "RMSprop", "ScheduleFreeSGD", "CAME")
"""Optimizers whose code is nearly that of another one."""
APART = [name for name in OTHER_OPTIMIZERS if name not in HERE]
VALIDATED = [
    f"--data.validation_path={TWEMOJI / 'validation'}",
    "--validation.noise_levels",
    "0.3",
    "0.7",
]
READS = {"Prodigy"}  # sums over all weights, one by one
SKIPPED = ("Prodigy", "Lion", "ScheduleFreeAdamW", "ScheduleFreeSGD", "CAME", "Adafactor", "Muon")


def told(name: str) -> list[str]:
    """The options of TOLD."""
    rate, *args = TOLD[name].split()
    flag = f"--optimizer={name}"
    return [flag, f"--learning_rate={rate}", *(["--optim.args", *args] if args else [])]


def three_runs(options: list[str], folder: Path, name: str) -> list[list[str]]:
    """Twelve steps; five of them, validated on the way, and the other seven."""
    straight, halves = (
        f"--output_dir={folder / f'{name}-{which}'}" for which in ("straight", "halves")
    )
    more = [*options, "--adapter.targets", "attention", "conv_in", *told(name), "--steps=12"]
    validated = [*more, *VALIDATED, "--validation.every=2", halves]
    return [[*more, straight], [*validated, "--steps=5"], validated]


def assert_learned_and_resumed(folder: Path, name: str) -> None:
    straight, halves = folder / f"{name}-straight", folder / f"{name}-halves"
    assert_same_adapter(straight, halves)
    losses = json.loads((halves / "loss.json").read_text())
    validation = [entry["loss"] for entry in losses["validation"]]
    assert validation[-1] < 0.998 * validation[0]
    assert (
        losses["loss_per_step"] == json.loads((straight / "loss.json").read_text())["loss_per_step"]
    )


def test_the_table_is_whole():
    assert list(TOLD) == list(OPTIMIZERS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in SIMILAR else name for name in HERE],
)
def test_it_learns_and_resumes_bit_for_bit(options, run_here, tmp_path, capsys, name):
    """Validation, which shows other weights than those trained, changes nothing either."""
    for argv in three_runs(options, tmp_path, name):
        assert run_here(argv) == 0
    assert "resumed at step 5 of 12" in capsys.readouterr().out
    assert_learned_and_resumed(tmp_path, name)


@pytest.fixture(scope="session")
def bitsandbytes(tmp_path_factory) -> Path:
    """A folder with bitsandbytes, apart: where it is installed PEFT imports it, and all else starts more slowly."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "-c",
        PROJECT / "constraints.txt",
    ]
    done = subprocess.run(
        [*command, "--target", folder, "bitsandbytes"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(
            f"bitsandbytes cannot be installed here: {done.stderr.strip().splitlines()[-1]}"
        )
    return folder


@pytest.mark.long
def test_bitsandbytes_learns_and_resumes_bit_for_bit(options, tmp_path, bitsandbytes):
    """On the CPU too; states of eight bits, with their scales."""
    runs = [argv for name in APART for argv in three_runs(options, tmp_path, name)]
    command = [sys.executable, str(RANKS), runs_file(tmp_path, *runs)]
    environment = {**os.environ, "PYTHONPATH": str(bitsandbytes)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in APART:
        assert_learned_and_resumed(tmp_path, name)
        (newest,) = (tmp_path / f"{name}-halves" / "checkpoints").glob("step_00000012")
        dtypes = {
            t.dtype
            for t in next(iter(torch.load(newest / "optimizer.pt").values())).values()
            if is_tensor(t)
        }
        assert (torch.uint8 in dtypes) == ("8bit" in name)


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


FAULTS = {
    "unknown": (
        "--optimizer=Prodigy --optim.args d_coeff=2",
        "Prodigy has no such argument; did you mean d_coef?",
    ),
    "the node's too": ("--optim.args momentun=0.9 --optimizer=SGD", "did you mean momentum?"),
    "not a number": (
        "--optimizer=Prodigy --optim.args growth_rate=fast",
        "growth_rate 'fast': input should be a",
    ),
    "not a switch": (
        "--optimizer=Lion --optim.args use_triton=3",
        "use_triton 3: input should be a valid boolean",
    ),
    "too many": ("--optimizer=CAME --optim.args eps=[1,2,3]", "CAME's default is (1e-30, 1e-16)"),
    "not two betas": ("--optimizer=CAME --optim.betas 0.9 0.99", "Use --optim.args betas="),
    "two betas": (
        "--optimizer=Lion --optim.args betas=[0.9,0.9]",
        "betas: use --optim.betas instead",
    ),
    "an option": (
        "--optimizer=Lion --optim.args weight_decay=1",
        "use --optim.weight_decay instead",
    ),
    "ours": (
        "--optimizer=Prodigy --optim.args fsdp_in_use=true lr=2",
        "lr: is set by the trainer. Use --learning_ra",
    ),
    "warm-up": (
        "--optimizer=ScheduleFreeSGD --optim.args warmup_steps=3",
        "Use --optim.lr_warmup_steps",
    ),
    "unused": (
        "--optimizer=SGD --optim.eps=1e-8",
        "--optim.eps: SGD has no such argument. It has dampening, momentum",
    ),
    "unused pair": (
        "--optimizer=Muon --optim.args nesterov=true",
        "nesterov: MuonAdamW has no such argument",
    ),
    "refused": (
        "--optimizer=SGD --optim.args nesterov=true",
        "SGD raises: Nesterov momentum requires a momentum",
    ),
    "schedule": (
        "--optimizer=ScheduleFreeAdamW --optim.lr_scheduler=cosine",
        "--optim.lr_scheduler cosine: Schedule",
    ),
    "two averages": (
        "--optimizer=ScheduleFreeAdamW --ema.decay=0.9",
        "evaluates its own average",
    ),
    "two rates": (
        "--optimizer=Prodigy --adapter.loraplus_lr_ratio=4",
        "Prodigy has one learning rate for all layers",
    ),
    "two rates of text": (
        "--optimizer=Prodigy --model.train_text_encoder --optim.text_encoder_learning_rate=0.1",
        "Prodigy has one learning rate for all layers",
    ),
    "fails in a step": (
        "--optimizer=Prodigy --optim.args slice_p=0",
        "Prodigy raises: slice step cannot be zero",
    ),
    "fails in its average": (
        "--optimizer=ScheduleFreeAdamW --optim.betas 0 0.99",
        "ScheduleFreeAdamW raises: float division by zero. Its arguments are betas = (0.0, 0.99)",
    ),
    "ends the process": (
        "--optimizer=Lion --optim.args use_triton=true",
        "Lion raises: it ends the program",
    ),
    "missing": (
        "--optimizer=AdamW8bit",
        "pip install bitsandbytes, or in the project's folder pip install -e '.[bits",
    ),
    "no value": ("--optim.args momentum", "expected name=value, not momentum"),
    "twice": ("--optim.args momentum=1 momentum=2", "momentum is given twice"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_it_is_told_is_checked_before_anything_is_done(
    options, run_here, tmp_path, monkeypatch, capsys, case
):
    monkeypatch.setitem(
        sys.modules, "bitsandbytes", None
    )  # not to be found, here or with the tests
    more, said = FAULTS[case]
    assert run_here([*options, f"--data.cache_dir={tmp_path / 'cache'}", *more.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_all_faults_are_said_at_once(options, run_here, capsys):
    more = (
        "--optimizer=Prodigy --optim.args d_coeff=2 growth_rate=fast --adapter.loraplus_lr_ratio=4"
    )
    assert (
        run_here([*options, *more.split(), "--validation.patience=3", "--export.weights=best"]) == 2
    )
    assert "cannot train: 5 errors" in capsys.readouterr().err


def test_a_recipe_has_arguments_as_a_mapping(options, run_here, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 1\noptimizer: prodigy\noptim:\n  args: {d_coef: 2, growth_rate: 1.5}\n"
    )
    assert run_here([str(recipe), *options]) == 0
    out = capsys.readouterr().out
    assert "optimizer   Prodigy of prodigyopt" in out
    assert "d_coef=2, growth_rate=1.5" in out
    assert "note" not in out
    again = [
        str(tmp_path / "out" / "config.yaml"),
        f"--output_dir={tmp_path / 'again'}",
        "--no_preview",
    ]
    assert run_here(again) == 0
    assert_same_adapter(tmp_path / "out", tmp_path / "again")


def test_whole_numbers_stay_whole(options, run_here):
    """Prodigy slices by slice_p, and has it as an int by its default alone."""
    assert (
        run_here(
            [*options, "--optimizer=Prodigy", "--learning_rate=1", "--optim.args", "slice_p=11"]
        )
        == 0
    )


def test_prodigy_says_which_rate_it_is_made_for(options, run_here, capsys):
    assert run_here([*options, "--optimizer=Prodigy"]) == 0
    assert (
        "--learning_rate is a factor on it. The usual factor is 1, not 0.0005"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", SKIPPED)
def test_a_step_that_is_not_finite_is_skipped(options, run_here, tmp_path, monkeypatch, name):
    from training.loss import LossFunction

    original, calls = LossFunction.__call__, []

    def broken(self, denoiser, batch):
        calls.append(batch)
        return original(self, denoiser, batch) * (float("nan") if len(calls) in (1, 4) else 1)

    monkeypatch.setattr(LossFunction, "__call__", broken)
    assert run_here([*options, *told(name), "--optim.on_non_finite=skip"]) == 0
    assert json.loads((tmp_path / "out" / "loss.json").read_text())["skipped_steps"] == [1, 4]
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_up" in key)


def test_momentum_begins_with_the_first_step_that_is_taken():
    """torch's fused SGD would begin with memory that nobody has written."""
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
    for value in (float("nan"), 1.0, 1.0):
        weight.grad = torch.full((4,), value)
        SkipNonFinite(optimizer).step(weight.grad.norm())
        if value != value:
            assert not optimizer.state
    assert weight.tolist() == pytest.approx([-1 - 1.9] * 4)


@pytest.mark.parametrize("name", SKIPPED)
def test_which_of_them_read_the_device_in_a_step(options, run_here, name):
    averages = [] if OPTIMIZERS[name].is_schedule_free else ["--ema.decay=0.9"]  # never reads
    counter = counted_run(run_here, [*options, *told(name), *averages, "--tracking.log_every=4"])
    assert [bool(counter.of(step)) for step in (2, 3)] == [name in READS] * 2


def test_the_exported_weights_of_a_schedule_free_run_are_its_average(options, run_here, tmp_path):
    """x = y + (1 - 1 / beta) (z - y), of what the checkpoint holds."""
    assert run_here([*options, *told("ScheduleFreeSGD")]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    trained, state = load_file(newest / "adapter.safetensors"), torch.load(newest / "optimizer.pt")
    exported = load_file(tmp_path / "out" / "lora.safetensors")
    name = next(n for n in state if n.endswith("lora_up.weight"))
    average = trained[name] + (1 - 1 / 0.8) * (state[name]["z"] - trained[name])
    key = f"lora_unet_{name.removesuffix('.lora_up.weight').replace('.', '_')}.lora_up.weight"
    assert not torch.allclose(average, trained[name], rtol=1e-3)
    torch.testing.assert_close(exported[key], average, rtol=1e-5, atol=1e-8)


def test_muon_updates_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    shapes = ((8, 5), (4, 3, 3, 3), (6,), (1, 7))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    combined = MuonAdamW(
        [{"params": ours[:2], "lr_scale": 1.0}, {"params": ours[2:], "lr_scale": 2.0}], lr=0.1
    )
    apart = [
        torch.optim.Muon(theirs[:1], 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[1:], 0.1, weight_decay=0.1, fused=True),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        combined.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert {group["lr_scale"] for group in combined.param_groups} == {1.0, 2.0}


def test_zero_takes_what_works_on_shares_of_weights(options, run_here, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused = [name for name, source in OPTIMIZERS.items() if not source.is_elementwise]
    assert [name for name in OPTIMIZERS if name not in refused] == [*NODE_OPTIMIZERS, "Lion"]
    for name in refused:
        assert run_here([*options, f"--optimizer={name}"]) == 2
        assert (
            f"DeepSpeed, which does not support {name}: it cannot update parts"
            in capsys.readouterr().err
        )


@pytest.mark.long
def test_two_processes_train_what_one_does(options, tmp_path):
    """And one of them goes on with what two began."""
    names = [
        "Prodigy",
        "ScheduleFreeAdamW",
        "Adafactor",
        "Muon",
    ]  # whose steps are not of each number by itself
    common = {name: [*options, *told(name), "--optim.lr_warmup_steps=2"] for name in names}
    one = [
        [*common[name], "--grad_accumulation_steps=2", f"--output_dir={tmp_path / name}"]
        for name in names
    ]
    two = [[*common[name], f"--output_dir={tmp_path / 'two' / name}"] for name in names]
    begun = [
        [*common[name], "--steps=3", f"--output_dir={tmp_path / 'begun' / name}"] for name in names
    ]
    result = launched("ddp", 2, runs_file(tmp_path, *two, *begun))
    assert result.returncode == 0, result.stderr
    gone_on = [[*common[name], f"--output_dir={tmp_path / 'begun' / name}"] for name in names]
    result = launched("ddp", 1, runs_file(tmp_path, *one, *gone_on))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("resumed at step 3 of 6") == len(names)
    for name in names:
        assert_same_adapter(tmp_path / name, tmp_path / "two" / name)
        assert_same_adapter(tmp_path / name, tmp_path / "begun" / name)
