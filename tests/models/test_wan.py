"""What is Wan's own: videos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.family_cases import Case, cases, family_of, folder_of
from PIL import Image

from common.errors import ModelError
from data.sources.comfy_shards import scan_folder
from training.sampling.draw import draw_sample
from training.sampling.prompts import SamplePrompt
from training.sampling.renderer import first_frame

CASE, SEEN = (next(case for case in cases() if str(case) == name) for name in ("wan", "wan2.1-i2v"))
FRAMES, SIDE = 9, 32


def of_videos(case: Case, folder: Path, options: list[str], frames: int = FRAMES) -> list[str]:
    """A run on that folder."""
    mine = [option for option in options if not option.startswith(("--model.path", "--data.path"))]
    return [
        *mine, f"--model.path={folder_of(case)}", f"--data.path={folder}", f"--data.resolution={SIDE}",
        f"--data.frames={frames}", "--steps=4", "--batch_size=1",
    ]  # fmt: skip


def add_image(folder: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "image.png")
    (folder / "image.txt").write_text("red")


def test_videos_and_images_are_trained_on_together(videos, options, run_here, capsys):
    add_image(videos)
    assert run_here(of_videos(CASE, videos, options)) == 0, capsys.readouterr().err
    assert "32x32 of 3 latent frames: 2, 32x32: 1" in capsys.readouterr().out


def test_an_image_teaches_a_model_nothing_that_is_given_the_first_frame(
    videos, options, run_here, capsys
):
    add_image(videos)
    short = [Image.new("RGB", (SIDE, SIDE), (90 * i, 0, 0)) for i in range(2)]
    short[0].save(
        videos / "short.webp", save_all=True, append_images=short[1:], duration=63, lossless=True
    )
    (videos / "short.txt").write_text("short")
    run = of_videos(SEEN, videos, options)
    for _ in range(2):  # also when the images are known
        assert run_here(run) == 2
        said = capsys.readouterr().err
        assert "the training data: 2 errors" in said
        assert (
            "image.png: an image; the model is given the first frame, so one frame alone teaches it nothing"
            in said
        )
        assert "short.webp: too short; the model is given the first frame" in said
    assert run_here([*run, "--data.on_error=skip"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "2 errors in the training data, 2 samples without errors" in said


def test_one_frame_is_refused_by_a_model_that_is_given_the_first(videos, options, run_here, capsys):
    assert run_here(of_videos(SEEN, videos, options, frames=1)) == 2
    assert "--data.frames 1: the model is given the first frame" in capsys.readouterr().err
    assert run_here(of_videos(CASE, videos, options, frames=1)) == 0


def test_comfyuis_latents_of_one_frame_are_refused_by_it_too(tmp_path):
    family = family_of(SEEN)
    for latents, wrong in (
        ((1, 16, 1, 4, 4), True),
        ((1, 16, 4, 4), True),
        ((1, 16, 3, 4, 4), False),
    ):
        pairs = [[[torch.ones(1, 5, 24), {}]]]
        torch.save(
            {"latents": [{"samples": torch.ones(latents)}], "conditioning": pairs},
            tmp_path / "shard_0000.pkl",
        )
        assert (
            any(
                "so one frame alone teaches it nothing" in fault
                for fault in scan_folder(tmp_path, family)[1]
            )
            == wrong
        )


def test_a_videos_latents_are_as_many_as_its_frames_and_come_back():
    family = family_of(CASE)
    encoders = family.load_encoders("media")
    pixels = torch.rand(1, 3, FRAMES, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        mean, deviation = family.encode_media(encoders, pixels)
        assert (
            mean.shape
            == deviation.shape
            == (1, 16, 1 + (FRAMES - 1) // family.limits.frame_step, SIDE // 8, SIDE // 8)
        )
        assert family.decode_media(encoders, mean).shape == pixels.shape
        first, _ = family.encode_media(encoders, pixels[:, :, 0])
    torch.testing.assert_close(
        first, mean[:, :, :1]
    )  # causal: an image is the beginning of a video


def test_a_caption_may_have_512_tokens_and_no_more():
    family = family_of(CASE)
    with torch.no_grad():
        row = family.encode_prompt(family.load_encoders("text"), ["x" * 700])[0]
    assert row["prompt_embeds"].shape == (512, 24)
    with pytest.raises(ModelError, match="513 tokens; this model takes 512"):
        family.comfy.read(torch.ones(1, 513, 24), {})
    assert family.comfy.read(torch.zeros(1, 512, 24), {})["prompt_embeds"].shape == (1, 24)


def test_comfyuis_first_frame_is_read_and_a_missing_one_is_an_error():
    family = family_of(next(case for case in cases() if str(case) == "wan2.2-i2v"))
    first, cond = torch.rand(1, 16, 3, 4, 4), torch.rand(1, 512, 24)
    found = family.comfy.read(cond, {"concat_latent_image": first})
    assert found["first_frame"].equal(first[0])
    assert family.comfy.write(found)[1]["concat_latent_image"].equal(first)
    with pytest.raises(ModelError, match="without first_frame"):
        family.comfy.read(cond, {})


@pytest.mark.parametrize(
    ("name", "parts"),
    [("wan", {"vae"}), ("wan2.1-i2v", {"vae", "image_encoder", "image_processor"})],
)
def test_what_encodes_a_video_is_what_its_store_is_known_by(name, parts):
    family = family_of(next(case for case in cases() if str(case) == name))
    assert {file.parent.name for file in family.identity_files("vae")} == parts


def test_previews_of_image_to_video_go_on_from_a_clips_first_frame():
    family = family_of(SEEN)
    pipeline = family.pipeline(family.load_denoiser(torch.float32))
    options = {**family.preview_options(1.0), "height": SIDE, "width": SIDE, "num_frames": 5}
    clip = torch.rand(family.latent_channels, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    size = (SIDE, SIDE)
    images = [first_frame(family, latents, pipeline, size) for latents in (clip, clip.roll(1, 1))]
    other_end = first_frame(family, torch.stack([clip[:, 0], clip[:, 0]], 1), pipeline, size)
    assert np.array_equal(images[0], other_end), "the rest of the clip is not looked at"
    options |= {"prompt": "owl", "num_inference_steps": 2}
    prompt = SamplePrompt("owl", seed=0)
    drawn = [draw_sample(pipeline, prompt, {**options, "image": image}) for image in images]
    assert drawn[0].shape == (5, SIDE, SIDE, 3)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
