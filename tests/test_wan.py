"""What is Wan's own: videos."""

import pytest
import torch
from family_cases import cases, family_of, folder_of
from PIL import Image

from models.base import take_comfy_cond
from models.config import ModelError

CASE, SEEN = (next(case for case in cases() if str(case) == name) for name in ("wan", "wan2.1-i2v"))
FRAMES, SIDE = 9, 32


@pytest.fixture
def videos(tmp_path):
    """A folder of two short animations and an image."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(2):
        frames = [Image.new("RGB", (SIDE, SIDE), (20 * i, 100 * number, 50)) for i in range(FRAMES)]
        frames[0].save(folder / f"{number}.webp", save_all=True, append_images=frames[1:], duration=63, lossless=True)
        (folder / f"{number}.txt").write_text("a photo of a cat")
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "image.png")
    (folder / "image.txt").write_text("red")
    return folder


@pytest.mark.parametrize("case", [CASE, SEEN], ids=str)
def test_videos_and_images_are_trained_on_together(case, videos, options, run_here, capsys):
    mine = [option for option in options if not option.startswith(("--model.path", "--data.images"))]
    more = [
        f"--model.path={folder_of(case)}", f"--data.images={videos}", f"--data.resolution={SIDE}",
        f"--data.frames={FRAMES}", "--steps=4", "--batch_size=1",
    ]  # fmt: skip
    assert run_here([*mine, *more]) == 0, capsys.readouterr().err
    assert "32x32 of 3 latent frames: 2, 32x32: 1" in capsys.readouterr().out


def test_a_videos_latents_are_as_many_as_its_frames_and_come_back():
    family = family_of(CASE)
    encoders = family.load_encoders("media")
    pixels = torch.rand(1, 3, FRAMES, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        mean, deviation = family.encode_media(encoders, pixels)
        assert mean.shape == deviation.shape == (1, 16, 1 + (FRAMES - 1) // family.frame_step, SIDE // 8, SIDE // 8)
        assert family.decode_media(encoders, mean).shape == pixels.shape
        first, _ = family.encode_media(encoders, pixels[:, :, 0])
    torch.testing.assert_close(first, mean[:, :, :1])  # causal: an image is the beginning of a video


def test_a_caption_may_have_512_tokens_and_no_more():
    family = family_of(CASE)
    with torch.no_grad():
        row = family.encode_prompt(family.load_encoders("text"), ["x" * 700])[0]
    assert row["prompt_embeds"].shape == (512, 24)
    with pytest.raises(ModelError, match="513 tokens; this model takes 512"):
        take_comfy_cond(family, torch.ones(1, 513, 24), {})
    assert family.cond_from_comfy(torch.zeros(1, 512, 24), {})["prompt_embeds"].shape == (1, 24)


def test_comfyuis_first_frame_is_taken_and_its_lack_is_told():
    family = family_of(next(case for case in cases() if str(case) == "wan2.2-i2v"))
    first, cond = torch.rand(1, 16, 3, 4, 4), torch.rand(1, 512, 24)
    found = take_comfy_cond(family, cond, {"concat_latent_image": first})
    assert found["first_frame"].equal(first[0])
    assert family.cond_to_comfy(found)[1]["concat_latent_image"].equal(first)
    with pytest.raises(ModelError, match="without first_frame"):
        take_comfy_cond(family, cond, {})


@pytest.mark.parametrize(
    ("name", "parts"), [("wan", {"vae"}), ("wan2.1-i2v", {"vae", "image_encoder", "image_processor"})]
)
def test_what_encodes_a_video_is_what_its_store_is_known_by(name, parts):
    family = family_of(next(case for case in cases() if str(case) == name))
    assert {file.parent.name for file in family.component_files("vae")} == parts
