"""Video files: what is taken of them, as pixels and as rows, and what is wrong with some."""

import io
import sys

import av
import numpy as np
import pytest
import torch
from helpers.data_cases import SINGLE_PROCESS, data_config
from helpers.data_families import Video
from helpers.project import BASE, reset_accelerate
from PIL import Image

import models
from common.errors import DataError
from data.batches import make_batch
from data.media.buckets import Crop
from data.media.video import Clip, ClipSampling, check, is_video, pixels
from data.precompute.build import build_datasets
from models.config import ModelConfig
from models.families.sd15 import StableDiffusion

WIDTH, HEIGHT = 96, 64
WHOLE = Crop(WIDTH, HEIGHT, WIDTH, HEIGHT, 0, 0, WIDTH, HEIGHT)
MOTION = {"mp4": "libx264", "mov": "libx264", "webm": "libvpx-vp9", "mkv": "mpeg4"}
FORMATS = [*MOTION, "gif", "webp"]


def pictures(count: int, first: int = 0) -> list[Image.Image]:
    """Frame i is grey of 8 i, its left half 20 darker."""
    found = []
    for i in range(first, first + count):
        array = np.full((HEIGHT, WIDTH, 3), 30 + 8 * i, np.uint8)
        array[:, : WIDTH // 2] -= 20
        found.append(Image.fromarray(array))
    return found


def video(count: int, form: str = "mp4", fps: int = 16, first: int = 0) -> bytes:
    """A file's content."""
    frames, file = pictures(count, first), io.BytesIO()
    if form in ("gif", "webp"):
        options = {"lossless": True} if form == "webp" else {}
        frames[0].save(
            file, form, save_all=True, append_images=frames[1:], duration=1000 // fps, **options
        )
        return file.getvalue()
    with av.open(file, "w", format="matroska" if form == "mkv" else form) as container:
        stream = container.add_stream(MOTION[form], rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(clip: torch.Tensor) -> list[int]:
    """Which of the pictures each frame is; their left half is the darker one, or the right one of mirrored ones."""
    grey = (clip.mean(0) + 1) * 127.5  # (F, H, W)
    halves = torch.stack(
        [grey[..., : WIDTH // 2].mean((1, 2)), grey[..., WIDTH // 2 :].mean((1, 2))]
    )
    assert ((halves[0] - halves[1]).abs() - 20).abs().max() < 4
    return ((halves.max(0).values - 30) / 8).round().int().tolist()


@pytest.mark.parametrize("form", FORMATS)
def test_a_clips_frames_are_those_shown_at_its_times(form):
    fps = 10 if form in ("gif", "webp") else 16
    content = video(12, form, fps)
    assert is_video(content)
    facts = check(content)
    assert (facts.width, facts.height) == (WIDTH, HEIGHT)
    assert facts.seconds == pytest.approx(12 / fps, abs=0.02)
    for start, count, rate, expected in [
        (0, 5, fps, [0, 1, 2, 3, 4]), (3 / fps, 4, fps, [3, 4, 5, 6]), (0, 4, fps / 2, [0, 2, 4, 6]),
        (0, 6, fps * 2, [0, 0, 1, 1, 2, 2]), (8 / fps, 6, fps, [8, 9, 10, 11, 11, 11]),
    ]:  # fmt: skip
        found = pixels(content, WHOLE, Clip(start, count, rate), "white")
        assert found.shape == (3, count, HEIGHT, WIDTH)
        assert numbers(found) == expected
    single = pixels(content, WHOLE, Clip(2 / fps, 1, fps), "white")
    assert single.shape == (3, HEIGHT, WIDTH)
    assert numbers(single[:, None]) == [2]


def test_frames_are_scaled_cropped_mirrored_and_turned_as_images_are():
    content = video(3)
    crop = Crop(WIDTH, HEIGHT, WIDTH // 2, HEIGHT // 2, 8, 0, 32, 32)
    found, mirrored = (
        pixels(content, crop, Clip(0, 2, 16), "white", flip) for flip in (False, True)
    )
    assert found.shape == (3, 2, 32, 32)
    assert found.flip(-1).equal(mirrored)
    assert found[..., :14].mean() < found[..., 18:].mean() - 0.1
    turned, file = io.BytesIO(content), io.BytesIO()
    with av.open(turned) as source, av.open(file, "w", format="mp4") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        copy.set_display_rotation(90)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    facts = check(file.getvalue())
    assert (facts.width, facts.height) == (HEIGHT, WIDTH)
    upright = Crop(HEIGHT, WIDTH, HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH)
    found = pixels(file.getvalue(), upright, Clip(0, 1, 16), "white")
    assert found[:, WIDTH // 2 :].mean() < found[:, : WIDTH // 2].mean() - 0.1, (
        "counter-clockwise: left is below"
    )


def test_what_is_transparent_in_an_animation_is_of_the_background():
    frames = [Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, alpha)) for alpha in (255, 0)]
    file = io.BytesIO()
    frames[0].save(
        file, "webp", save_all=True, append_images=frames[1:], duration=100, lossless=True
    )
    found = pixels(file.getvalue(), WHOLE, Clip(0, 2, 10), "#0000ff")
    assert [found[:, i, 0, 0].tolist() for i in (0, 1)] == [[1, -1, -1], [-1, -1, 1]]


@pytest.mark.parametrize(
    ("frames", "spread", "seconds", "expected"),
    [
        (5, False, 1.0, [(0, 5)]), (5, True, 1.0, [(0, 5), (5, 5), (10, 5)]),
        (5, True, 11 / 16, [(0, 5), (6, 5)]), (9, True, 9 / 16, [(0, 9)]), (9, True, 8 / 16, [(0, 5)]),
        (9, False, 3 / 16, [(0, 1)]), (9, False, 0.001, [(0, 1)]), (1, True, 3 / 16, [(0, 1), (1, 1), (2, 1)]),
    ],
)  # fmt: skip
def test_clips_are_as_many_as_asked_for_and_never_share_frames(frames, spread, seconds, expected):
    found = ClipSampling(frames, 16, 4, spread).clips(seconds)
    assert [(clip.start * 16, clip.frames) for clip in found] == expected


@pytest.fixture
def family():
    return Video(ModelConfig(path=str(BASE)))


@pytest.fixture
def folder(tmp_path):
    """Three videos and an image, with captions."""
    path = tmp_path / "videos"
    path.mkdir()
    for name, content in {
        "long.mp4": video(21), "loop.gif": video(11, "gif", 10, first=5), "short.webm": video(7, "webm", first=3),
    }.items():  # fmt: skip
        (path / name).write_bytes(content)
    pictures(1)[0].save(path / "still.png")
    for file in list(path.iterdir()):
        file.with_suffix(".txt").write_text(file.stem)
    return path


@pytest.fixture
def build(tmp_path, family):
    def run(images, family=family, **options):
        reset_accelerate()
        given = {
            "resolution": 96,
            "cache_dir": str(tmp_path / "cache"),
            "path": str(images),
            **options,
        }
        return build_datasets(data_config(**given), family, SINGLE_PROCESS)

    yield run
    reset_accelerate()


def shapes(dataset) -> dict[str, list[tuple]]:
    found: dict[str, list[tuple]] = {}
    for row in range(len(dataset)):
        found.setdefault(dataset.name(row), []).append(tuple(dataset.latents(row).shape))
    return found


def test_videos_become_rows_of_clips_in_buckets_of_their_size_and_length(
    build, folder, family, capsys
):
    built = build(folder, frames=9, random_flip=True)
    h, w = built.train.latents(0).shape[-2:]
    frames = {"long.mp4": 3, "loop.gif": 3, "short.webm": 2, "still.png": 1}
    assert shapes(built.train) == {name: [(4, count, h, w)] for name, count in frames.items()}
    assert len(built.train.buckets) == 3
    assert built.encoded_images == 2 * 4
    assert (
        "1 video has fewer frames than --data.frames 9\n  short.webm: 5 frames at 16 per second"
        in capsys.readouterr().out
    )
    assert build(folder, frames=9, random_flip=True).encoded_images == 0
    encoders = family.load_encoders("media")
    row = [built.train.name(row) for row in range(4)].index("long.mp4")
    crop = Crop(*built.train.samples["crop"][row].tolist())
    clip = pixels((folder / "long.mp4").read_bytes(), crop, Clip(0, 9, 16), "white")
    with torch.no_grad():
        expected = family.encode_media(encoders, clip[None])[0][0]
    torch.testing.assert_close(built.train.latents(row), expected, rtol=1e-4, atol=1e-4)
    batch = make_batch(built.train, [row] * 6, list(range(6)), range(6))
    assert len({one.numpy().tobytes() for one in batch.latents}) == 2, "mirrored as a whole"


def test_several_clips_of_a_video_are_rows_that_are_held_out_together(build, folder):
    built = build(folder, frames=5, video_clips="spread", validation_fraction=0.25)
    every = shapes(built.train)
    held_out = shapes(built.validation)
    assert {name: len(rows) for name, rows in (every | held_out).items()} == {
        "long.mp4": 4, "loop.gif": 3, "short.webm": 1, "still.png": 1,
    }  # fmt: skip
    assert len(held_out) == 1
    assert not every.keys() & held_out.keys()
    assert build(folder, frames=5, video_clips="first").encoded_images == 0, (
        "the first clips are the same"
    )
    rate = build(folder, frames=5, fps=8.0)
    assert (len(rate.train), rate.encoded_images) == (4, 3)


def test_a_mask_file_counts_in_all_frames_and_alpha_is_of_images_alone(build, folder):
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (0, 0, WIDTH // 2, HEIGHT))
    for file in folder.glob("*.txt"):
        mask.save(file.with_name(f"{file.stem}_mask.png"))
    assert len(build(folder, frames=5).train) == 4, "masks are no images"
    masked, plain = (build(folder, frames=5, masks=masks).train for masks in ("files", "alpha"))
    assert [masked.latents(row).shape[1] for row in range(4)].count(2) == 3
    for row in range(4):
        (of_file,), (whole,) = (
            make_batch(dataset, [row], [0], range(1)).mask for dataset in (masked, plain)
        )
        width = of_file.shape[-1]
        halves = (torch.arange(width) < width // 2).float().expand_as(of_file)
        torch.testing.assert_close(of_file, halves, rtol=0, atol=0.05)  # scaling blurs the edge
        assert whole.equal(torch.ones_like(whole))


def test_a_model_of_images_takes_no_videos(build, folder):
    plain = StableDiffusion(ModelConfig(path=str(BASE)))
    for name in ("long", "short"):
        (folder / f"{name}.txt").unlink()
    built = build(folder, plain)
    assert shapes(built.train).keys() == {"still.png", "loop.gif"}, (
        "of an animation the first frame"
    )
    assert {shape for of_name in shapes(built.train).values() for shape in of_name} == {
        built.train.latents(0).shape
    }
    with pytest.raises(DataError, match=r"--data\.frames 5: this model makes images"):
        build(folder, plain, frames=5)


def test_frames_that_the_model_does_not_take_are_refused(build, folder):
    with pytest.raises(
        DataError,
        match=r"--data\.frames 16: this model takes one more than a multiple of 4 frames\. Use 13 or 17",
    ):
        build(folder, frames=16)


def test_all_bad_videos_are_named(build, folder, monkeypatch):
    whole = (folder / "long.mp4").read_bytes()
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    bad = {
        "empty": b"",
        "noise": bytes(range(256)) * 20,
        "cut": whole[: len(whole) // 2],
        "sound": sound.getvalue(),
    }
    for name, content in bad.items():
        (folder / f"{name}.mp4").write_bytes(content)
        (folder / f"{name}.txt").write_text(name)
    with pytest.raises(DataError) as caught:
        build(folder)
    message = str(caught.value)
    assert "4 errors" in message
    for said in ("empty.mp4: the file is empty", "noise.mp4: neither an image nor a readable video", "cut.mp4: ",
                 "sound.mp4: the file has no video stream"):  # fmt: skip
        assert said in message
    assert len(build(folder, on_error="skip").train) == 4
    (folder / "other.mp4").write_bytes(video(2))
    (folder / "other.txt").write_text("")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        DataError, match=r"other\.mp4: videos are read with PyAV.*pip install 'train-lora\[video\]'"
    ):
        build(folder)


def test_the_report_and_the_sheets_show_clips(folder, run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.FAMILIES, Video.name, "helpers.data_families")
    options = [
        f"--model.path={BASE}", f"--data.path={folder}", f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.resolution=96", "--data.frames=5", "--data.video_clips=spread", f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert run_here(["data", *options, "--sheets", str(tmp_path / "sheets")]) == 0
    said = capsys.readouterr().out
    assert "112 x 80, 5 frames" in said
    assert "4, 4 of them differ" in said, "captions are those of videos"
    assert "the same file more than once  none" in said
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["bucket_112x80.png"]
    train = ["--steps=2", "--batch_size=2", "--rank=4", "--training_dtype=fp32", "--lora_dtype=fp32",
             "--no_preview", "--adapter.targets=attention"]  # fmt: skip
    assert run_here([*options, *train]) == 0
    assert "112x80 of 2 latent frames: 8" in capsys.readouterr().out
