"""Every family's recipe runs as it is, in bf16, with a tiny model of the family in place of the real one."""

import pytest
import yaml
from conftest import PROJECT
from family_cases import SIDE, cases, folder_of

from models import FAMILIES

RECIPES = {path.stem: path for path in sorted((PROJECT / "recipes").glob("*.yaml"))}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd15"])
def test_a_recipe_runs_on_a_tiny_model(family, options, run_here, tmp_path, capsys):
    recipe = yaml.safe_load(RECIPES[family].read_text(encoding="utf-8"))
    assert recipe["model"]["family"] == family
    case = next(case for case in cases() if case.family == family)
    kept = ("--data.images", "--data.cache_dir", "--output_dir")
    small = [
        *(option for option in options if option.startswith(kept)), *case.options,
        f"--model.path={folder_of(case)}", f"--data.resolution={SIDE}", "--steps=2", "--data.num_workers=0",
        "--preview.num_inference_steps=2", "--validation.every=0",
    ]  # fmt: skip
    assert run_here([str(RECIPES[family]), *small]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    out = capsys.readouterr().out
    assert "base weights bfloat16" in out
    assert "could not be drawn" not in out
