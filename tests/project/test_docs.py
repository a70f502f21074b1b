"""The documentation is true: links lead somewhere, recipes are valid, and every command runs."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers.pages import (
    SHORT_RUN,
    blocks,
    commands,
    make_training_adapter,
    make_workspace,
    page,
    words_of,
)
from helpers.project import BASE, PROJECT, accelerate_launch, script
from safetensors.torch import load_file

from data.config import SourceConfig
from lora_algos.config import Override
from models import FAMILIES
from training.cli import validate_options
from training.optim.registry import OPTIMIZERS

PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/emoji/README.md",
    *sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "docs").rglob("*.md")),
]  # fmt: skip
COMMANDS = [(name, command) for name in PAGES for command in commands(name)]
LAUNCHES = [
    (name, command)
    for name, command in COMMANDS
    if command.startswith("accelerate launch") and "--machine_rank" not in command
]
TOOL_PAGES = ("README.md", "docs/data.md", "docs/quickstart.md")
NOT_RUN = {
    r"git clone <this repository> && cd <its folder>": "needs a published repository",
    r"python3 -m venv .*|pip (install|download) .*": "the Makefile and CI install",
    r"make [\w -]+": "test_make_targets_exist",
    r"sbatch .*": "tests/distributed/test_slurm.py submits the scripts",
    r"accelerate launch .*--machine_rank .*": "tests/distributed/test_hosts.py starts two hosts",
    r"wandb sync .*": "needs an account",
    r"npm install .*|python examples/emoji/train_\w+\.py .*": "takes hours; base.log has the output",
    r"python examples/emoji/make_style_set\.py .*": "needs the npm packages",
    r"python benchmarks/\w+\.py.*": "tests/project/test_benchmarks_*.py run the scripts",
}
"""Commands that this file does not run -> the reason, or what runs them."""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Work in a folder with the examples, the user's images and the recipe of the README."""
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_run(command: str) -> bool:
    return not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def test_every_command_is_run_or_has_a_reason():
    for name, command in COMMANDS:
        if is_run(command):
            assert command.startswith(("accelerate launch", "python train_lora.py")), (
                name,
                command,
            )
    unused = [
        pattern
        for pattern in NOT_RUN
        if not any(re.fullmatch(pattern, command) for _, command in COMMANDS)
    ]
    assert unused == []


@pytest.mark.parametrize(("name", "command"), LAUNCHES)
def test_launch_commands_run(name, command, workspace, cache_dir, run_here):
    words = words_of(command)
    position = words.index("train_lora.py")
    arguments = [
        *words[position + 1 :],
        *SHORT_RUN,
        f"--data.cache_dir={cache_dir}",
        "--output_dir=out",
    ]
    if "--objective.slider.targets" in words:
        arguments.append("--objective.slider.denoising_steps=1")
    if "--model.assistant_lora" in words:
        make_training_adapter(workspace / "training_adapter.safetensors")
    if position > 2:  # options of Accelerate
        launcher = accelerate_launch(*words[2:position])
        result = script(arguments, launcher, ACCELERATE_USE_CPU="true")
        assert result.returncode == 0, result.stderr
        assert "x 2 = " in result.stdout, "the summary shows two processes"
    else:
        assert run_here(arguments) == 0
    assert (workspace / "out" / "lora.safetensors").is_file()
    config = yaml.safe_load((workspace / "out" / "config.yaml").read_text())
    has_ema = config["ema"]["decay"] > 0
    assert (workspace / "out" / "lora.raw.safetensors").is_file() == has_ema


@pytest.mark.parametrize("name", TOOL_PAGES)
def test_data_commands_run(name, workspace, cache_dir, run_here):
    tool_commands = [c for c in commands(name) if c.startswith("python train_lora.py")]
    assert tool_commands
    for command in tool_commands:
        options = [f"--data.cache_dir={cache_dir}", "--data.resolution=64"]
        assert run_here([*words_of(command)[2:], *options]) == 0


def test_the_commands_on_runs_run(workspace, cache_dir, run_here):
    short = ["--steps=2", "--no_preview", f"--data.cache_dir={cache_dir}", "--data.num_workers=0"]
    for recipe in ("demo", "demo_flow"):
        assert run_here([f"recipes/{recipe}.yaml", *short]) == 0
    for command in commands("docs/report.md"):
        assert run_here(words_of(command)[2:]) == 0, command
    assert (workspace / "comparison.html").is_file()


def test_the_commands_on_files_run(workspace, cache_dir, run_here):
    short = ["--steps=2", "--no_preview", f"--data.cache_dir={cache_dir}", "--data.num_workers=0"]
    assert run_here(["recipes/demo.yaml", *short]) == 0
    for command in commands("docs/formats.md"):
        assert run_here(words_of(command)[2:]) == 0, command
    assert (workspace / "output" / "kronecker.safetensors").is_file()


def test_the_command_that_converts_a_checkpoint_runs(options, run_here, tmp_path, monkeypatch):
    (command,) = [
        c for c in commands("docs/checkpoints.md") if c.startswith("python train_lora.py")
    ]
    assert run_here([*options, "--steps=1", "--export.formats=comfyui", "--lora_dtype=bf16"]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    monkeypatch.chdir(tmp_path)
    words = words_of(command.replace("<output_dir>/checkpoints/step_00000100", str(newest)))
    assert run_here(words[2:]) == 0
    converted = load_file("step_100.safetensors")
    exported = load_file("out/lora.safetensors")
    assert converted.keys() == exported.keys()
    assert all(tensor.equal(exported[name]) for name, tensor in converted.items())


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/formats.md"])
def test_the_code_for_diffusers_runs(name, workspace, cache_dir, run_here):
    short = [*SHORT_RUN, f"--data.cache_dir={cache_dir}"]
    recipes = {"output/my_dog": "my_dog.yaml", "output/demo": "recipes/demo.yaml"}
    for code in blocks(name, "python"):
        (folder,) = [folder for folder in recipes if folder in code]
        assert run_here([recipes[folder], *short, f"--output_dir={folder}"]) == 0
        code = code.replace("stabilityai/stable-diffusion-xl-base-1.0", str(BASE)).replace(
            '.to("cuda")', ""
        )
        (image_name,) = re.findall(r'"(\w+\.png)"', code)
        exec(compile(code, name, "exec"), {})
        assert Path(image_name).is_file()


@pytest.mark.parametrize("name", PAGES)
def test_recipes_on_pages_are_valid(name):
    for text in blocks(name, "yaml"):
        validate_options(yaml.safe_load(text), name, "")


def test_the_quickstart_has_the_recipe_of_the_readme():
    assert blocks("README.md", "yaml") == blocks("docs/quickstart.md", "yaml")


def test_the_options_page_is_up_to_date():
    path = PROJECT / "docs" / "generate_options.py"
    spec = importlib.util.spec_from_file_location("generate_options", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert page("docs/options.md") == module.options_page(), "run make docs"


def test_the_options_page_has_the_entries_of_lists():
    text = page("docs/options.md")
    for name, entry in (("data.sources", SourceConfig), ("adapter.overrides", Override)):
        table = text.split(f"### In the list {name}\n")[1].split("\n##")[0]
        listed = re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)
        assert {option.split(".")[0] for option in listed} == {item.name for item in fields(entry)}
    assert "| `path` | text | required |" in text


def test_the_readme_begins_with_the_two_commands():
    assert commands("README.md")[:2] == ["make demo", "make test"]


@pytest.mark.parametrize(
    "target", ["setup", "demo", "test", "test-long", "lint", "types", "bench", "docs"]
)
def test_make_targets_exist(target):
    result = subprocess.run(
        ["make", "-n", target], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_models_page_lists_every_family_with_its_recipe():
    rows = [
        line.split("|") for line in page("docs/models.md").splitlines() if line.startswith("| `")
    ]
    recipes = {row[1].strip(" `"): row[3].strip(" `") for row in rows if "recipes/" in row[3]}
    assert recipes == {name: f"recipes/{name}.yaml" for name in FAMILIES}
    for name, path in recipes.items():
        assert path in page("README.md")
        assert name == "sd15" or f"family: {name}" in page(path)


def test_the_training_page_lists_every_optimizer_with_its_package():
    rows = [
        line.split("|") for line in page("docs/training.md").splitlines() if line.startswith("| `")
    ]
    listed = {}
    for row in rows:
        for name in re.findall(r"`(\w+)`", row[1]):
            listed[name] = row[2].strip()
    packages = {name: entry.package for name, entry in OPTIMIZERS.items()}
    assert {name: listed.get(name) for name in packages} == packages


def test_optimizer_packages_are_dependencies():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for entry in OPTIMIZERS.values():
        needed = project["dependencies"] if entry.extra is None else extras[entry.extra]
        assert any(name.startswith(f"{entry.package}>=") for name in needed), entry.package
    assert {*extras["optimizers"]} <= {*extras["test"]}


ACCELERATE_CONFIGS = sorted((PROJECT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs_leave_precision_to_the_trainer(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["mixed_precision"] == "no"
    assert config.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1) == 1
    assert f"`{path.name}`" in page("docs/cluster.md")


def test_the_cpu_config_runs(options):
    launcher = accelerate_launch("--config_file", str(PROJECT / "accelerate_configs" / "cpu.yaml"))
    assert script([*options, "--steps=1"], launcher).returncode == 0


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = (PROJECT / name).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page(name)):
        if target.startswith("https://"):
            continue
        path = folder / target if target else PROJECT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_say_what_has_not_been_run():
    for name in ("README.md", "docs/models.md", "docs/cluster.md"):
        status = page(name).split("<!-- status -->\n")[1].split("\n\n")[0]
        assert "GPU" in status or "nodes" in status


def test_git_ignores_what_runs_write():
    if not shutil.which("git") or not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    for path in ("output/demo/lora.safetensors", ".venv/bin/python"):
        command = ["git", "check-ignore", "-q", path]
        assert subprocess.run(command, cwd=PROJECT, check=False).returncode == 0
