"""The documentation is true: the options page is the config's, and every command in the README runs."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import fields

import pytest
import yaml
from helpers.project import BASE, PROJECT, TWEMOJI, accelerate_launch, script
from safetensors.torch import load_file

from data.config import SourceConfig
from lora_algos.config import Override
from models import FAMILIES
from training.cli import validate
from training.optim.registry import NAMED

README = (PROJECT / "README.md").read_text(encoding="utf-8")
TRAINING = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
FAMILY_PAGE = (PROJECT / "docs" / "families.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    return [
        line.split("#")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.strip()
    ]


def launches(page: str) -> list[str]:
    return [command for command in commands(page) if command.startswith("accelerate launch")]


COMMANDS, LAUNCHES = commands(README), launches(README)


def test_the_options_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location(
        "generate_options", PROJECT / "docs" / "generate_options.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (PROJECT / "docs" / "options.md").read_text(encoding="utf-8") == module.options_page(), (
        "run make docs"
    )


def test_the_options_of_what_stands_in_lists_are_on_the_page():
    page = (PROJECT / "docs" / "options.md").read_text(encoding="utf-8")
    for name, item in (("data.sources", SourceConfig), ("adapter.overrides", Override)):
        table = page.split(f"### In the list {name}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)`", table, re.M) == [field.name for field in fields(item)]
    assert "| `path` | text | required |" in page
    for recipe in re.findall(r"```yaml\n(.*?)```", page, re.S):
        validate(yaml.safe_load(recipe), "the page", "")


def test_the_readme_opens_with_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert [c for c in COMMANDS if not c.startswith("accelerate launch")] == [
        "make demo",
        "make test",
    ]
    assert len(LAUNCHES) == 2


@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint", "types", "bench", "docs"])
def test_make_targets_exist(target):
    result = subprocess.run(
        ["make", "-n", target], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def words_of(command: str) -> list[str]:
    return shlex.split(
        command.replace("<model>", str(BASE)).replace("<folder>", str(TWEMOJI / "train"))
    )


@pytest.mark.parametrize("command", [*launches(TRAINING), *launches(FAMILY_PAGE)])
def test_the_commands_on_training_and_families_run(command, run_here, tmp_path, cache_dir):
    words = words_of(command)
    assert words[:4] == ["accelerate", "launch", "train_lora.py", "recipes/sd15.yaml"]
    short = ["--steps=3", "--validation.every=2", "--data.resolution=64", f"--output_dir={tmp_path}", "--batch_size=1",
             f"--data.cache_dir={cache_dir}", "--no_preview", "--data.num_workers=0"]  # fmt: skip
    assert run_here([str(PROJECT / words[3]), *words[4:], *short]) == 0
    assert (tmp_path / "lora.safetensors").is_file()
    assert (tmp_path / "lora.raw.safetensors").is_file() == ("ema" in command)


def test_the_recipe_on_families_names_comfyuis_files():
    (recipe,) = re.findall(r"```yaml\n(.*?)```", FAMILY_PAGE, re.S)
    assert len(validate(yaml.safe_load(recipe), "the page", "").model.text_encoders) == 2


def test_the_command_that_converts_a_checkpoint_runs(options, run_here, tmp_path, monkeypatch):
    (command,) = [
        command for command in commands(TRAINING) if command.startswith("python train_lora.py")
    ]
    assert run_here([*options, "--steps=1", "--export.formats=comfyui", "--lora_dtype=bf16"]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    monkeypatch.chdir(tmp_path)
    words = words_of(command.replace("<output_dir>/checkpoints/step_00000100", str(newest)))
    assert run_here(words[2:]) == 0
    converted, exported = (
        load_file(path) for path in ("step_100.safetensors", "out/lora.safetensors")
    )
    assert converted.keys() == exported.keys()
    assert all(tensor.equal(exported[name]) for name, tensor in converted.items())


def test_the_recipe_on_training_is_one_and_all_optimizers_are_there():
    (recipe,) = re.findall(r"```yaml\n(.*?)```", TRAINING, re.S)
    assert validate(yaml.safe_load(recipe), "the page", "").optim.args == (
        "d_coef=0.8",
        "use_bias_correction=True",
    )
    rows = [line.split("|")[1:3] for line in TRAINING.splitlines() if line.startswith("| `")]
    listed = {
        name: package.strip() for names, package in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert listed == {name: source.package for name, source in NAMED.items()}


def test_the_page_of_families_has_every_one_with_its_recipe():
    rows = [line.split("|") for line in FAMILY_PAGE.splitlines() if line.startswith("| `")]
    recipes = {row[1].strip(" `"): row[3].strip(" `") for row in rows if len(row) == 6}
    assert recipes == {name: f"recipes/{name}.yaml" for name in FAMILIES}
    for name, path in recipes.items():
        assert name == "sd15" or f"family: {name}" in (PROJECT / path).read_text(encoding="utf-8")


def test_the_packages_of_the_optimizers_are_the_projects():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for source in NAMED.values():
        needs = project["dependencies"] if source.extra is None else extras[source.extra]
        assert any(need.startswith(source.package + ">=") for need in needs), source.package
    assert {*extras["optimizers"]} <= {*extras["test"]}


@pytest.mark.parametrize("command", LAUNCHES)
def test_the_readmes_launch_commands_run(command, tmp_path, cache_dir):
    words = words_of(command)
    at = words.index("train_lora.py")
    short = ["--steps=2", "--data.resolution=64", f"--output_dir={tmp_path}", f"--data.cache_dir={cache_dir}",
             "--sample.num_inference_steps=2", "--data.num_workers=0"]  # fmt: skip
    result = script(
        [*words[at + 1 :], *short], accelerate_launch(*words[2:at]), ACCELERATE_USE_CPU="true"
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "lora.safetensors").is_file()
    if "ddp" in command:
        assert "2 x 2 x 2 = 8 samples per step" in result.stdout


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (PROJECT / "accelerate_configs").glob("*.yaml"))
)
def test_accelerate_configs_leave_precision_to_us(name):
    config = yaml.safe_load((PROJECT / "accelerate_configs" / f"{name}.yaml").read_text())
    assert config["mixed_precision"] == "no"
    assert config.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1) == 1
    assert f"`{name}.yaml`" in README


def test_the_cpu_config_runs(options):
    launcher = accelerate_launch("--config_file", str(PROJECT / "accelerate_configs" / "cpu.yaml"))
    assert script([*options, "--steps=1"], launcher).returncode == 0


def test_links_in_the_documentation_lead_somewhere():
    for page in [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *PROJECT.glob("docs/*.md"),
                 *PROJECT.glob("*/README.md"), PROJECT / "examples" / "emoji" / "README.md"]:  # fmt: skip
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (
                f"{page}: {target}"
            )


def test_git_ignores_what_runs_write():
    if not shutil.which("git") or not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    for path in ("output/demo/lora.safetensors", ".venv/bin/python"):
        assert (
            subprocess.run(["git", "check-ignore", "-q", path], cwd=PROJECT, check=False).returncode
            == 0
        )
