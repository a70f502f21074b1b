"""The documentation is true: the options page is the config's, and every command in the README runs."""

import importlib.util
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import BASE, PROJECT, TWEMOJI, accelerate_launch, script

README = (PROJECT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
LAUNCHES = [command for command in COMMANDS if command.startswith("accelerate launch")]


def test_the_options_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_options", PROJECT / "docs" / "generate_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (PROJECT / "docs" / "options.md").read_text(encoding="utf-8") == module.options_page(), "run make docs"


def test_the_readme_opens_with_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert [c for c in COMMANDS if not c.startswith("accelerate launch")] == ["make demo", "make test"]
    assert len(LAUNCHES) == 2


@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint", "types", "bench", "docs"])
def test_make_targets_exist(target):
    result = subprocess.run(["make", "-n", target], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", LAUNCHES)
def test_the_readmes_launch_commands_run(command, tmp_path, cache_dir):
    filled = command.replace("<model>", str(BASE)).replace("<folder>", str(TWEMOJI / "train"))
    words = shlex.split(filled)
    at = words.index("train_lora.py")
    short = ["--steps=2", "--data.resolution=64", f"--output_dir={tmp_path}", f"--data.cache_dir={cache_dir}",
             "--preview.num_inference_steps=2", "--data.num_workers=0"]  # fmt: skip
    result = script([*words[at + 1 :], *short], accelerate_launch(*words[2:at]), ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "lora.safetensors").is_file()
    if "ddp" in command:
        assert "2 x 2 x 2 = 8 samples per step" in result.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in (PROJECT / "accelerate_configs").glob("*.yaml")))
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
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_git_ignores_what_runs_write():
    if not shutil.which("git") or not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    for path in ("output/demo/lora.safetensors", ".venv/bin/python"):
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=PROJECT, check=False).returncode == 0
