"""Previews with text encoders that stay in CPU memory: the same images."""

from pathlib import Path

import pytest
from helpers.family_cases import SIDE, Case, cases, folder_of
from helpers.project import BASE

from common.hashing import sha256_of_file
from training import preview

DRAWN = ["--preview", "--sample.num_inference_steps=2", "--sample.prompts", "a cat"]


def preview_hash(run_here, options: list[str], folder: Path, placement: str) -> str:
    more = [f"--output_dir={folder / placement}", f"--model.text_encoder_placement={placement}"]
    assert run_here([*options, *DRAWN, "--steps=1", *more]) == 0
    return sha256_of_file(folder / placement / "preview.png")


def test_text_encoders_that_stay_on_the_cpu_draw_the_same(options, run_here, tmp_path, monkeypatch):
    placed = []
    original = preview.place_text_encoders

    def place(pipeline, placement, device):
        placed.append(placement)
        result = original(pipeline, placement, device)
        assert next(pipeline.text_encoder.parameters()).is_meta  # its values wait on the CPU
        assert not any(parameter.is_meta for parameter in pipeline.unet.parameters())
        assert not any(parameter.is_meta for parameter in pipeline.vae.parameters())
        return result

    monkeypatch.setattr(preview, "place_text_encoders", place)
    options = [*options, f"--model.path={BASE}"]
    expected = preview_hash(run_here, options, tmp_path, "device")
    assert placed == []
    assert preview_hash(run_here, options, tmp_path, "layers") == expected
    assert preview_hash(run_here, options, tmp_path, "cpu") == expected
    assert placed == ["layers", "layers"]


@pytest.mark.long
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_family_draws_the_same(case: Case, options, run_here, tmp_path, videos):
    model = [f"--model.path={folder_of(case)}", f"--data.resolution={SIDE}", *case.options]
    if case.first_frame:
        model += [f"--data.path={videos}", "--data.frames=5"]
    expected = preview_hash(run_here, [*options, *model], tmp_path, "device")
    assert preview_hash(run_here, [*options, *model], tmp_path, "layers") == expected
