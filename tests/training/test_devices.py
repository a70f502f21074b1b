"""Whole runs on a CUDA device that computes on the CPU.

They show operators that mix devices, steps that wait for the device, and products in slow dtypes. Each run encodes,
trains, validates, saves, exports and draws a preview. See helpers/fake_cuda.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_cuda.build import compile_guard, missing_requirement
from helpers.family_cases import SIDE, Case, cases, folder_of
from helpers.project import PROJECT
from helpers.runs import assert_same_result

from lora_algos import ALGORITHMS

RUN = PROJECT / "tests" / "helpers" / "fake_cuda" / "run.py"
QUIET_STEPS = (1, 2)
"""Steps after which nothing is logged."""
WITH_MASK = {
    "chroma",
    "ernie_image",
    "hunyuan_video15",
    "ideogram4",
    "krea2",
    "qwen_image",
    "qwen_image_21",
    "qwen_image_edit",
    "qwen_image_edit_plus",
}
"""Families that mask the padding of captions, if those of a batch have different lengths."""
WITHOUT_MASK_TOO = {"krea2", "qwen_image_21"}
"""Families with another attention: over layers of the text encoder, of the text alone."""
WITH_EXACT_POSITIONS = {"ideogram4"}
"""Families whose positions are products in fp32: bf16 would round them."""
FP32_PRODUCTS = {
    "LoHa": {"lora_algos/loha.py:row_product_grads"},
    "OFT": {"lora_algos/rotation.py:cayley_grad"},
    "BOFT": {"lora_algos/rotation.py:cayley_grad"},
}
"""Algorithm -> where its steps take products in fp32, although training is in bf16."""

SOME_ALGORITHMS = ["LoRA", "LoHa", "DoRA"]
OTHER_ALGORITHMS = [name for name in ALGORITHMS if name not in SOME_ALGORITHMS]

pytestmark = pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_guard(tmp_path_factory.mktemp("fake_cuda"))


def run_all(library: Path, folder: Path, runs: list[list[str]]) -> list[dict[str, Any]]:
    """Runs the script on the device; returns the exit code and the record of each run."""
    runs_file, records_file = folder / "runs.json", folder / "records.json"
    runs_file.write_text(json.dumps(runs))
    command = [sys.executable, str(RUN), str(library), str(runs_file), str(records_file)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert records_file.exists(), process.stderr
    records = json.loads(records_file.read_text())
    failed = [run[0] for run, record in zip(runs, records, strict=True) if record["code"]]
    assert not failed, f"{failed}\n{process.stderr}"
    return records


def options_of(folder: Path, model: Path, images: Path, steps: int, *more: str) -> list[str]:
    """Options of a run that logs, validates and saves only after its last step."""
    return [
        f"--output_dir={folder}", f"--model.path={model}", f"--data.path={images}", f"--data.validation_path={images}",
        f"--data.cache_dir={folder.parent / 'cache'}", f"--data.resolution={SIDE}", "--data.num_workers=0",
        f"--steps={steps}", "--batch_size=2", "--rank=4", "--sample.num_inference_steps=2", "--sample.prompts", "a cat",
        "--tracking.log_every=3", "--validation.every=3", "--checkpoint.every=3",
        "--memory.budget=none", *more,
    ]  # fmt: skip


def in_steps(record: dict[str, Any], kind: str, steps: tuple[int, ...]) -> list[list]:
    """The entries of some steps, without the step."""
    return [entry[1:] for entry in record[kind] if entry[0] in steps]


LIKE_OTHERS = ("sdxl_inpaint", "flux1_fill", "qwen_image_edit", "flux1_kontext")
"""Families with the layers of another one; make test-long trains them on a device."""


def one_of_each_family() -> list[Case]:
    chosen = {case.family: case for case in cases() if case.family not in LIKE_OTHERS}
    return [*chosen.values()]


def test_every_family_trains_on_a_device(library, images, videos, tmp_path):
    check_cases(one_of_each_family(), library, images, videos, tmp_path)


@pytest.mark.long
def test_other_variants_of_the_families_train_on_a_device(library, images, videos, tmp_path):
    variants = [case for case in cases() if case not in one_of_each_family()]
    assert len(variants) > 5
    check_cases(variants, library, images, videos, tmp_path)


@pytest.mark.long
def test_text_encoders_train_on_a_device(library, images, videos, tmp_path):
    case = next(case for case in cases() if case.family == "sdxl")
    options = [*family_options(case, images, videos, tmp_path), "--model.train_text_encoder"]
    (record,) = run_all(library, tmp_path, [options])
    assert in_steps(record, "reads", QUIET_STEPS) == []


def check_cases(
    families: list[Case], library: Path, images: Path, videos: Path, folder: Path
) -> None:
    runs = [family_options(case, images, videos, folder) for case in families]
    for case, record in zip(families, run_all(library, folder, runs), strict=True):
        assert in_steps(record, "reads", QUIET_STEPS) == [], str(case)
        attention = in_steps(record, "attention", QUIET_STEPS)
        assert attention, str(case)
        assert {dtype for dtype, *_ in attention} == {"bfloat16"}, str(case)
        masks = {"bool"} if case.family in WITH_MASK else {"none"}
        if case.family in WITHOUT_MASK_TOO:
            masks.add("none")
        assert {mask for _, mask, *_ in attention} == masks, str(case)
        products = in_steps(record, "products", QUIET_STEPS)
        dtypes = {"bfloat16", "float32"} if case.family in WITH_EXACT_POSITIONS else {"bfloat16"}
        assert {dtype for _, dtype, *_ in products} == dtypes, str(case)
        assert decoded_dtypes(record) == {"float32"}, str(case)


def decoded_dtypes(record: dict[str, Any]) -> set[str]:
    """The dtypes of convolutions in previews: those of the VAE, and with a UNet some on the way to it."""
    drawing = [entry[1:] for entry in record["products"] if entry[3] == "sampling/draw.py:call"]
    return {dtype for operator, dtype, *_ in drawing if operator == "aten::convolution"}


def family_options(case: Case, images: Path, videos: Path, folder: Path) -> list[str]:
    data = (
        [f"--data.path={videos}", f"--data.validation_path={videos}", "--data.frames=9"]
        if case.first_frame
        else []
    )
    for option in ("--data.control_paths", "--data.validation_control_paths"):
        if case.controls:
            data += [option, *[str(control_folder(images))] * case.controls]
    return options_of(folder / str(case), folder_of(case), images, 3, *case.options, *data)


def control_folder(images: Path) -> Path:
    """A copy of the images, which are their own control images."""
    folder = images.parent / "controls"
    if not folder.is_dir():
        shutil.copytree(images, folder, ignore=shutil.ignore_patterns("*.txt"))
    return folder


@pytest.mark.parametrize(
    "algorithms",
    [SOME_ALGORITHMS, pytest.param(OTHER_ALGORITHMS, marks=pytest.mark.long)],
    ids=["some", "others"],
)
def test_every_algorithm_trains_and_continues_on_a_device(library, images, tmp_path, algorithms):
    """Linear layers and convolutions, two micro-batches, an average; then one more step, without checkpointing."""
    model = folder_of(next(case for case in cases() if case.family == "sdxl"))
    more = ["--adapter.targets", r"down_blocks\.1\..*", "--grad_accumulation_steps=2", "--ema.decay=0.9",
            "--no_preview", "--validation.every=0"]  # fmt: skip
    runs = []
    for name in algorithms:
        common = [f"--algorithm={name}", *more]
        runs.append(options_of(tmp_path / name, model, images, 2, *common))
        runs.append(
            options_of(tmp_path / name, model, images, 3, *common, "--no_gradient_checkpointing")
        )
    records = run_all(library, tmp_path, runs)
    fp32_products = {}
    for name, record in zip(algorithms, records[::2], strict=True):
        assert in_steps(record, "reads", (1,)) == [], name
        products = in_steps(record, "products", (1,))
        fp32_products[name] = {place for _, dtype, place, _ in products if dtype != "bfloat16"}
    assert fp32_products == {name: FP32_PRODUCTS.get(name, set()) for name in algorithms}


def test_offloaded_blocks_train_and_draw_on_a_device(library, images, tmp_path):
    """No step waits for the device, and the losses are those of a model that is there as a whole."""
    model = folder_of(next(case for case in cases() if case.family == "sd3"))
    runs = []
    for name, number in (("plain", "0"), ("offloaded", "all")):
        offload = f"--memory.offload_blocks={number}"
        runs.append(options_of(tmp_path / name, model, images, 3, offload))
    for record in run_all(library, tmp_path, runs):
        assert in_steps(record, "reads", QUIET_STEPS) == []
    assert (tmp_path / "plain" / "preview.png").exists()
    assert (tmp_path / "offloaded" / "preview.png").exists()
    assert_same_result(tmp_path / "plain", tmp_path / "offloaded")


CHECKS = """
import sys
from pathlib import Path
from helpers.fake_cuda.build import load_guard
load_guard(Path(sys.argv[1]))
import torch
from helpers.fake_cuda.device import MixedDevices, fake_cuda

def mixes_devices(action):
    try:
        action()
    except MixedDevices:
        return True
    return False

with fake_cuda() as record:
    x = torch.arange(4.0, device="cuda").requires_grad_()
    assert mixes_devices(lambda: x + torch.ones(4))
    assert mixes_devices(lambda: torch.ones(4) * x)
    assert mixes_devices(lambda: torch.randn(4, device="cuda", generator=torch.Generator()))
    assert not record.reads
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.nn.functional.linear(x, x[None] * torch.tensor(2.0)).sum()
    y.backward()
    assert x.grad.device.type == "cuda" and not record.reads
    assert [dtype for _, _, dtype, _ in record.products] == ["bfloat16"] * len(record.products) != []
    reads = [lambda: x.cpu(), lambda: x.sum().item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: x.tolist(),
             lambda: torch.zeros(4).copy_(x)]
    for count, read in enumerate(reads, start=1):
        read()
        assert sum(record.reads.values()) == count, count
    assert x.grad.tolist() == [0.0, 4.0, 8.0, 12.0]
"""


def test_the_device_refuses_mixed_tensors_and_counts_reads(library):
    command = [sys.executable, "-c", CHECKS, str(library)]
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.returncode == 0, process.stderr
