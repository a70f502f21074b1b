"""Reading a config: names, ranges and defaults of the node, every fault at once, and speed."""

import re
import resource
import subprocess
import sys
from dataclasses import asdict

import pytest
from helpers.project import BASE, PROJECT, TWEMOJI, script

from common.errors import ConfigError
from training.cli import DEMO_RECIPE, load_config
from training.config import TrainConfig, to_dict, to_yaml

NEEDED = [f"--model.path={BASE}", f"--data.path={TWEMOJI / 'train'}"]

# name: (default, smallest, largest) of ComfyUI's TrainLoraNode
NODE_NUMBERS = {
    "batch_size": (1, 1, 10000),
    "grad_accumulation_steps": (1, 1, 1024),
    "steps": (16, 1, 100000),
    "learning_rate": (5e-4, 1e-7, 1.0),
    "rank": (8, 1, 128),
    "seed": (0, 0, 2**64 - 1),
}
NODE_CHOICES = {
    "optimizer": ("AdamW", "Adam", "SGD", "RMSprop"),
    "loss_function": ("MSE", "L1", "Huber", "SmoothL1"),
    "training_dtype": ("bf16", "fp32", "none"),
    "lora_dtype": ("bf16", "fp32"),
}


@pytest.mark.parametrize("name", NODE_NUMBERS)
def test_numbers_have_the_nodes_default_and_range(name):
    default, low, high = NODE_NUMBERS[name]
    assert getattr(TrainConfig(), name) == default
    for value in (low, high):
        assert getattr(load_config([*NEEDED, f"--{name}={value}"]), name) == value
    for value in (low / 2 if name == "learning_rate" else low - 1, high + 1):
        with pytest.raises(ConfigError, match=f"--{name} "):
            load_config([*NEEDED, f"--{name}={value}"])


@pytest.mark.parametrize("name", NODE_CHOICES)
def test_choices_are_the_nodes_in_any_case(name, tmp_path):
    assert getattr(TrainConfig(), name) == NODE_CHOICES[name][0]
    for choice in NODE_CHOICES[name]:
        for written in (choice, choice.lower(), choice.upper()):
            assert getattr(load_config([*NEEDED, f"--{name}", written]), name) == choice
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{name}: {choice.upper()}")
        assert getattr(load_config([str(recipe), *NEEDED]), name) == choice


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 30\nrank: 4\noptim: {eps: 1e-6}")
    config = load_config([str(recipe), *NEEDED, "--steps", "40"])
    assert (config.steps, config.rank, config.batch_size, config.optim.eps) == (40, 4, 1, 1e-6)


def test_no_arguments_mean_the_demo():
    assert load_config([]) == load_config([str(DEMO_RECIPE)])
    assert load_config(NEEDED).steps == TrainConfig().steps


@pytest.mark.parametrize(
    "recipe", sorted((PROJECT / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_loads(recipe):
    assert load_config([str(recipe), *NEEDED]).model.path == str(BASE)


def test_the_resolved_config_reads_back(tmp_path):
    config = load_config(
        [
            *NEEDED,
            "--adapter.targets",
            "attention",
            "conv_in",
            "--export.merged_model",
            "--overwrite",
        ]
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    again = load_config([str(file)])
    assert to_dict(again) == to_dict(config)
    assert not again.overwrite, "a file to repeat from must not delete"


@pytest.mark.parametrize("value", ["true", "True", "false"])
def test_flags_take_a_value_too(value):
    expected = value.lower() == "true"
    config = load_config(
        [*NEEDED, "--export.merged_model", value, f"--gradient_checkpointing={value}"]
    )
    assert (config.export.merged_model, config.gradient_checkpointing) == (expected, expected)


def test_all_faults_of_a_recipe_are_listed_with_their_names(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        "optimzer: adam\nbatch_size: 0\nmodel: {pth: x}\noptim: {betas: [1, 2]}\nadapter: {targets: []}"
    )
    with pytest.raises(ConfigError) as error:
        load_config([str(recipe)])
    message = str(error.value)
    for part in ("bad.yaml: 6 errors", "optimzer: no such option; did you mean optimizer?", "batch_size 0: ",
                 "model.pth: no such option; did you mean model.path?", "optim.betas.0 1: ", "optim.betas.1 2: ",
                 "adapter.targets (empty): "):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("content", ["[1, 2]", "a: b: c", "steps: x", "\xff\xfe"])
def test_a_broken_recipe_is_a_config_error(tmp_path, content):
    recipe = tmp_path / "broken.yaml"
    recipe.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config([str(recipe)])


BAD_COMMAND_LINES = {
    "near miss": (["--bach_size", "3"], "--batch_size"),
    "not a number": (["--steps", "many"], "--steps"),
    "wrong choice": (["--optimizer", "lyon"], "AdamW"),
    "out of range": (["--rank", "129"], "--rank 129: "),
    "missing recipe": (["nowhere.yaml"], "nowhere.yaml is not a file"),
    "no model": (["--data.path", "."], "--model.path: no model given"),
    "no images": (["--model.path", str(BASE)], "--data.path: no training images given"),
    "model is no model": (["--model.path", str(TWEMOJI), "--data.path", "."], "model_index.json"),
    "model is a pickle": (
        ["--model.path", str(PROJECT / "LICENSE"), "--data.path", "."],
        "expected a .safetensors or .gguf file",
    ),
    "images are no folder": (
        [NEEDED[0], "--data.path", "/nowhere"],
        "--data.path /nowhere: is not a folder",
    ),
    "output_dir is a file": (
        [*NEEDED, "--output_dir", str(PROJECT / "LICENSE")],
        "exists and is not a folder",
    ),
    "a list of sources": (
        [*NEEDED, "--data.sources=x"],
        "--data.sources: is a list of sections",
    ),
    "a list's option": (
        [*NEEDED, "--adapter.overrides.0.rank", "4"],
        "--adapter.overrides: is a list of sections",
    ),
    "existing LoRA is no file": (
        [*NEEDED, "--existing_lora", "/nowhere"],
        "--existing_lora /nowhere: does not exist",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_a_wrong_command_line_ends_with_2_and_no_traceback(case):
    argv, expected = BAD_COMMAND_LINES[case]
    result = script(argv)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--rank", "0"]], ids=["help", "config error"])
def test_help_and_config_errors_answer_within_a_second(argv):
    def seconds() -> float:
        """CPU time of the script: it waits for nothing, and other processes of a busy machine do not count."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        script([*NEEDED, *argv])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 1


@pytest.mark.parametrize("command", [[], ["data"]], ids=["train", "data"])
def test_help_shows_the_options_own_defaults(command):
    """Not those of the demo, which is what runs without a recipe; with a recipe, the recipe's."""
    plain, demo = r"--rank INT.*?\(default: 8\)", r"--rank INT.*?\(default: 16\)"
    assert re.search(plain, script([*command, "--help"]).stdout, re.S)
    assert re.search(plain, script([*command, "--rnk", "3"]).stderr, re.S)
    assert re.search(demo, script([*command, str(DEMO_RECIPE), "--help"]).stdout, re.S)


def test_options_alone_are_those_of_the_demo():
    assert load_config(["--rank", "3"]) == load_config([str(DEMO_RECIPE), "--rank", "3"])


def test_reading_a_config_loads_no_torch():
    code = "import sys, train_lora; train_lora.load_config([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


def test_asdict_is_what_pydantic_validates():
    assert asdict(TrainConfig())["adapter"]["targets"] == ("all",)


def test_paths_beside_the_models_are_looked_at_before_anything_loads(options, run_here, capsys):
    wrong = ["--model.vae=nope.safetensors", "--model.config=nowhere/at/all"]
    wrong += ["--data.control_paths", "no_folder", "--export.formats", "kohya", "kohya"]
    assert run_here([*options, *wrong]) == 2
    said = capsys.readouterr().err
    assert "--data.control_paths no_folder: is not a folder" in said
    assert "--export.formats kohya kohya: kohya is repeated" in said
    assert "--model.vae nope.safetensors: does not exist" in said
    assert "--model.config nowhere/at/all: does not exist" in said


INPUT = ["--model.path", str(BASE)]


@pytest.mark.parametrize("inside", ["", "output/run"])
def test_a_run_does_not_write_into_its_images(tmp_path, inside):
    folder = tmp_path / inside
    with pytest.raises(ConfigError, match="would become training images"):
        load_config([*INPUT, f"--data.path={tmp_path}", f"--output_dir={folder}"])


BAD_RECIPES = {
    "data.path: x": "data.path: dots are for the command line. Write `data:`, and `path:` below",
    "steps: 3\nrank: 4\nsteps: 5": "line 3: steps is set twice",
    "adapter: {targets: attention}": "adapter.targets 'attention': expected a list",
    "model: some/folder": "model 'some/folder': expected a section",
}


@pytest.mark.parametrize("content", BAD_RECIPES)
def test_mistakes_in_yaml_are_explained(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config([str(recipe)])
    assert BAD_RECIPES[content] in str(error.value)
