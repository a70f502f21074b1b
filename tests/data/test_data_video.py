"""Latents of videos, and conditioning that is made of the sample itself: stores, batches, masks, ComfyUI, training."""

import pytest
import torch
from helpers.data_cases import SINGLE_PROCESS, data_config, dataset_with, sample_of
from helpers.data_families import Video
from helpers.project import BASE, reset_accelerate
from PIL import Image

import models
from common.errors import DataError
from data.batches import make_batch
from data.export import write_dataset
from data.precompute.build import DatasetBuilder
from data.sources import comfy_shards
from data.store.keys import key_of
from models.config import ModelConfig
from models.families.sd15 import StableDiffusion
from objectives.config import ObjectiveConfig
from training.loss import build_loss


@pytest.fixture
def family():
    return Video(ModelConfig(path=str(BASE)))


@pytest.fixture
def build(tmp_path):
    """Builds data sets, and exports them if asked to."""

    def run(family, export=None, form="encoded", **options):
        reset_accelerate()
        given = {
            "resolution": 64,
            "cache_dir": str(tmp_path / options.pop("cache", "cache")),
            **options,
        }
        with DatasetBuilder.opened(data_config(**given), family, SINGLE_PROCESS) as opened:
            built = opened.encode(opened.plan(False))
            if export is not None:
                write_dataset(opened, built, export, form)
        return built.train

    yield run
    reset_accelerate()


def stored(dataset) -> dict[bytes, dict]:
    """Rows by their latents."""
    return {
        dataset.latents(row).numpy().tobytes(): dataset.cond(row) for row in range(len(dataset))
    }


TEXTS = [key_of(text) for text in ("", "caption 0", "caption 1")]


def test_rows_of_one_size_and_other_numbers_of_frames_never_share_a_batch(tmp_path):
    frames = (1, 3, 1, 3, 2)
    media = {
        key_of(f"media {i}"): {"latents": torch.randn(4, n, 2, 2)} for i, n in enumerate(frames)
    }
    texts = {text: {"prompt_embeds": torch.ones(3, 5)} for text in TEXTS}
    dataset = dataset_with(tmp_path, [sample_of(i) for i in range(5)], media, texts)
    found = {
        dataset.latent_frames(bucket[0].first): sum(s.count for s in bucket)
        for bucket in dataset.buckets
    }
    assert found == {1: 2, 2: 1, 3: 2}
    for bucket in dataset.buckets:
        chosen = [row for s in bucket for row in range(s.first, s.first + s.count)]
        batch = make_batch(dataset, chosen, chosen, range(len(chosen)))
        assert (
            batch.latents.shape
            == batch.noise.shape
            == (len(chosen), 4, dataset.latent_frames(chosen[0]), 2, 2)
        )


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 3, 16, 16)])
def test_a_mask_counts_in_all_channels_and_frames(tmp_path, family, shape, monkeypatch):
    mask = torch.zeros(16, 16)
    mask[:4, :8] = 0.5
    row = {"latents": torch.randn(shape), "mask": mask, "first_frame": torch.randn(4, 16, 16)}
    texts = {text: {"prompt_embeds": torch.randn(24, 96)} for text in TEXTS}
    dataset = dataset_with(
        tmp_path, [sample_of(0), sample_of(1)], {key_of(f"media {i}"): row for i in range(2)}, texts
    )
    family = family if len(shape) == 4 else StableDiffusion(family.config)
    loss = build_loss(family, ObjectiveConfig(), "MSE", torch.float32)
    monkeypatch.setattr(
        loss, "elementwise", lambda prediction, target: torch.ones_like(target - prediction)
    )
    losses = loss(
        family.load_denoiser(torch.float32), make_batch(dataset, [0, 1], [0, 1], range(2))
    )
    torch.testing.assert_close(losses, torch.full((2,), 0.5 * 32 / 256))


def test_images_are_videos_of_one_frame_with_conditioning_of_their_own(build, family, images):
    Image.open(images / "cat.png").convert("RGB").resize((96, 48)).save(images / "cat.png")
    options = {"path": str(images), "random_flip": True, "masks": "alpha", "vae_sampling": "sample"}
    dataset, plain = build(family, **options), build(StableDiffusion(family.config), **options)
    assert len(dataset.buckets) == len(plain.buckets) == 2
    assert {dataset.latents(row)[:, 0].numpy().tobytes() for row in range(4)} == stored(
        plain
    ).keys()
    rows = [row for row in range(4) if dataset.size(row) == (64, 64)]
    batch = make_batch(dataset, (rows * 3)[:8], list(range(8)), range(8))
    assert batch.latents.shape == (8, 4, 1, 16, 16)
    assert batch.mask.shape == (8, 16, 16)
    assert batch.cond.keys() == {"prompt_embeds", "first_frame"}
    own, mirrored = batch.cond["first_frame"], batch.cond["first_frame"].flip(-1)
    distances = [(batch.latents[:, :, 0] - other).flatten(1).std(1) for other in (own, mirrored)]
    assert (distances[0] < distances[1] / 2).all(), (
        "mirrored or not, each has that of its own media"
    )


@pytest.mark.parametrize("form", ["comfyui", "safetensors", "encoded"])
def test_they_go_out_and_come_back(build, family, images, tmp_path, form):
    first = build(family, path=str(images), export=tmp_path / "out", form=form, caption_dropout=0.5)
    if form != "encoded":
        sample = next(
            comfy_shards.read_samples(
                tmp_path / "out", family, comfy_shards.shard_paths(tmp_path / "out")[0].name
            )
        )
        assert sample.latents.shape == (4, 1, 16, 16)
    again = build(family, path=str(tmp_path / "out"), cache="other", caption_dropout=0.5)
    assert again.samples["caption_dropout"].tolist() == [0.5] * 4
    one, other = stored(first), stored(again)
    assert one.keys() == other.keys()
    assert all(
        one[key][name].equal(other[key][name])
        for key in one
        for name in ("prompt_embeds", "first_frame")
    )


def test_comfyui_latents_with_and_without_frames(build, family, tmp_path):
    def shard(name, *latents, **extras):
        saved = [{"samples": samples} for samples in latents]
        cond = [[torch.zeros(1, 24, 96), {"pooled_output": None, **extras}]]
        (tmp_path / name).mkdir()
        torch.save(
            {"latents": saved, "conditioning": [cond] * len(saved)},
            tmp_path / name / "shard_0000.pkl",
        )
        return str(tmp_path / name)

    image, frame, clip = (
        torch.randn(2, 4, 8, 8),
        torch.randn(1, 4, 1, 8, 8),
        torch.randn(2, 4, 3, 8, 8),
    )
    with_first = {"concat_latent_image": torch.randn(1, 4, 3, 8, 8)}
    dataset = build(family, path=shard("all", image, frame, clip, **with_first))
    assert sorted(dataset.latents(row).shape[1] for row in range(5)) == [1, 1, 1, 3, 3]
    assert dataset.cond(0)["first_frame"].equal(with_first["concat_latent_image"][0, :, 0])
    with pytest.raises(
        DataError, match="sample 0: conditioning without first_frame, which this model needs"
    ):
        build(family, path=shard("lacking", clip[:1]))
    plain = StableDiffusion(family.config)
    dataset = build(plain, path=shard("images", image, frame))
    assert {dataset.latents(row).shape for row in range(3)} == {(4, 8, 8)}
    plain.comfy.has_frame_axis = True
    build(plain, path=str(tmp_path / "images"), export=tmp_path / "out", form="comfyui")
    assert torch.load(tmp_path / "out" / "shard_0000.pkl")["latents"][0]["samples"].shape == (
        1,
        4,
        1,
        8,
        8,
    )
    with pytest.raises(
        DataError, match=r"latents of shape \(2, 4, 3, 8, 8\): this model makes images"
    ):
        build(plain, path=shard("clip", clip))


def test_a_video_family_trains_and_draws_sheets(options, images, run_here, tmp_path, monkeypatch):
    monkeypatch.setitem(models.FAMILIES, Video.name, "helpers.data_families")
    more = [
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.validation_fraction=0.25",
        "--data.masks=alpha",
    ]
    assert run_here([*options, *more]) == 0
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert (
        run_here(["data", *options, *more, "--sheets", str(tmp_path / "sheets"), "--decode"]) == 0
    )
    assert (tmp_path / "sheets" / "bucket_64x64.png").is_file()
