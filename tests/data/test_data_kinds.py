"""Data sets in every form, from source to training: ComfyUI's, encoded ones, masks, sampled latents, buckets."""

import json
import shutil

import pytest
import torch
from helpers.data_cases import SINGLE_PROCESS, data_config, source_config
from helpers.project import BASE, TWEMOJI, reset_accelerate
from PIL import Image

from common.errors import DataError
from data.batches import make_batch
from data.export import write_dataset
from data.precompute.build import DatasetBuilder, Datasets
from data.schedule import random_key
from data.sources.comfy_writer import write_folder
from models.config import ModelConfig
from models.detect import get_family


@pytest.fixture
def family():
    return get_family(ModelConfig(path=str(BASE)))


@pytest.fixture
def build(tmp_path, family):
    """Builds data sets, and exports them if asked to."""

    def run(export=None, form="encoded", **options) -> Datasets:
        reset_accelerate()
        config = data_config(
            resolution=64, cache_dir=str(tmp_path / options.pop("cache", "cache")), **options
        )
        with DatasetBuilder.opened(config, family, SINGLE_PROCESS) as opened:
            built = opened.encode(opened.plan(False))
            if export is not None:
                write_dataset(opened, built, export, form)
        return built

    yield run
    reset_accelerate()


def by_latents(built) -> dict[bytes, tuple]:
    """Rows whatever their order and names."""
    dataset = built.train
    return {
        dataset.latents(r).numpy().tobytes(): (dataset.cond(r), dataset.size(r))
        for r in range(len(dataset))
    }


def assert_same_rows(one, other):
    a, b = by_latents(one), by_latents(other)
    assert a.keys() == b.keys()
    for latents, (cond, size) in a.items():
        assert b[latents][1] == size
        assert all(tensor.equal(b[latents][0][name]) for name, tensor in cond.items())


@pytest.mark.parametrize("form", ["comfyui", "safetensors"])
def test_comfyui_folders_go_out_and_come_back(build, images, tmp_path, form):
    Image.effect_noise((100, 50), 30).save(images / "wide.png")
    (images / "wide.txt").write_text("noise")
    first = build(path=str(images), export=tmp_path / "out", form=form)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "metadata.json",
        "shard_0000.pkl" if form == "comfyui" else "shard_0000.safetensors",
    ]
    again = build(path=str(tmp_path / "out"), cache="cache2")
    assert_same_rows(first, again)
    assert (again.encoded_images, again.encoded_captions) == (0, 0)
    assert_same_rows(first, build(path=str(tmp_path / "out"), cache="cache2"))
    with pytest.raises(DataError, match="out exists already"):
        build(path=str(images), export=tmp_path / "out", form=form)


def test_encoded_folders_train_without_the_images(build, images, tmp_path):
    options = {"random_flip": True, "caption_one_per_line": True, "caption_dropout": 0.1}
    (images / "cat.txt").write_text("one\ntwo")
    first = build(path=str(images), export=tmp_path / "encoded", **options)
    seeds = [random_key("sample", 0, v) for v in range(40)]
    expected = make_batch(first.train, [v % 4 for v in range(40)], seeds, range(40))
    shutil.rmtree(images)
    shutil.rmtree(tmp_path / "cache")
    again = build(path=str(tmp_path / "encoded"), **options)
    assert again.encoded_images == 0
    assert again.encoded_captions == 1, "the empty prompt"
    assert again.train.content_hash == first.train.content_hash
    batch = make_batch(again.train, [v % 4 for v in range(40)], seeds, range(40))
    assert batch.latents.equal(expected.latents)
    assert batch.cond["prompt_embeds"].equal(expected.cond["prompt_embeds"])
    with pytest.raises(
        DataError,
        match=r"encoded with --data\.random_flip True, and this run has False\. Use the same options",
    ):
        build(path=str(tmp_path / "encoded"))
    about = json.loads((tmp_path / "encoded" / "encoded.json").read_text())
    (tmp_path / "encoded" / "encoded.json").write_text(json.dumps({**about, "vae": "another"}))
    with pytest.raises(DataError, match=r"encoded with another VAE than that of --model\.path"):
        build(path=str(tmp_path / "encoded"), **options)


def test_a_damaged_encoded_folder_is_refused(build, images, tmp_path):
    build(path=str(images), export=tmp_path / "encoded")
    (shard,) = (tmp_path / "encoded" / "media").iterdir()
    data = next(shard.glob("*.arrow"))
    content = bytearray(data.read_bytes())
    content[-100] ^= 1
    data.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name}: damaged. Export the dataset again"):
        build(path=str(tmp_path / "encoded"))
    shutil.rmtree(shard)
    with pytest.raises(DataError, match="media: 4 of its rows are missing"):
        build(path=str(tmp_path / "encoded"))


def test_sources_of_all_kinds_in_one_run(build, images, tmp_path):
    build(path=str(images), export=tmp_path / "comfy", form="comfyui")
    build(path=str(images), export=tmp_path / "encoded")
    folder = tmp_path / "more"
    folder.mkdir()
    shutil.copy(TWEMOJI / "train" / "anguished.png", folder / "other.png")
    sources = (source_config(str(tmp_path / "comfy")), source_config(str(tmp_path / "encoded"), weight=0.5),
               source_config(str(folder), caption_text="angry"))  # fmt: skip
    built = build(sources=sources, cache="fresh")
    assert len(built.train) == 4 + 4 + 1
    assert (built.encoded_images, built.encoded_captions) == (1, 1)
    batch = make_batch(built.train, list(range(9)), list(range(9)), range(9))
    assert sorted(batch.weight.tolist()) == [0.5] * 4 + [1.0] * 5


def test_faults_of_comfyui_data_are_listed_with_their_files(build, tmp_path, family):
    folder = tmp_path / "bad"
    folder.mkdir()
    good = (
        {"samples": torch.zeros(1, 4, 16, 16)},
        [[torch.zeros(1, 24, 96), {"pooled_output": None}]],
    )
    wrong = (
        {"samples": torch.zeros(1, 16, 16, 16)},
        [[torch.zeros(1, 77, 2048), {"pooled_output": None}]],
    )
    latents, conditioning = ([a, b] for a, b in zip(good, wrong, strict=True))
    torch.save({"latents": latents, "conditioning": conditioning}, folder / "shard_0000.pkl")
    (folder / "shard_0001.pkl").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        build(path=str(folder))
    message = str(caught.value)
    assert "shard_0000.pkl sample 1" in message
    assert "(SDXL)" in message
    assert "shard_0001.pkl" in message
    built = build(path=str(folder), on_error="skip")
    assert len(built.train) == 1


def test_conditioning_of_other_lengths_and_dtypes_never_shares_a_batch(build, tmp_path):
    none = {"pooled_output": None}
    samples = [
        (torch.randn(4, 16, 16), torch.randn(1, 24 * (1 + i % 2), 96), none) for i in range(6)
    ]
    samples.append((torch.randn(4, 16, 16).half(), torch.randn(1, 24, 96).half(), none))
    write_folder(tmp_path / "mixed", samples)
    built = build(path=str(tmp_path / "mixed"))
    assert sorted(sum(s.visits for s in bucket) for bucket in built.train.buckets) == [1, 3, 3]
    for bucket in built.train.buckets:
        rows = [row for s in bucket for row in range(s.first, s.first + s.count)]
        make_batch(built.train, rows, rows, range(len(rows)))


def test_latents_are_drawn_anew_at_each_visit(build, images):
    built = build(path=str(images), vae_sampling="sample")
    seeds = [random_key("sample", 0, v) for v in range(500)]
    batch = make_batch(built.train, [0] * 500, seeds, range(500))
    row = built.train.media.read_row(built.train.media_id(0))
    scaled = (batch.latents - row["latents"]) / row["deviation"]
    assert abs(scaled.mean()) < 0.02
    assert abs(scaled.std() - 1) < 0.02
    correlation = torch.corrcoef(torch.stack([scaled.flatten(), batch.noise.flatten()]))[0, 1]
    assert abs(correlation) < 0.01, "not the noise of the sample again"
    mode = build(path=str(images)).train
    assert mode.latents(0).equal(row["latents"])


@pytest.mark.parametrize("masks", ["alpha", "files"])
def test_masks_reach_the_loss_at_the_size_of_the_latents(build, tmp_path, masks):
    folder = tmp_path / "images"
    folder.mkdir()
    alpha = Image.new("L", (64, 64), 0)
    alpha.paste(255, (0, 0, 32, 64))
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    if masks == "alpha":
        picture.putalpha(alpha)
    else:
        alpha.save(folder / "a_mask.png")
    picture.save(folder / "a.png")
    built = build(
        path=str(folder), caption_text="x", masks=masks, mask_min_value=0.25, random_flip=True
    )
    batch = make_batch(built.train, [0] * 20, list(range(20)), range(20))
    left, right = batch.mask[:, :, :8].mean((1, 2)), batch.mask[:, :, 8:].mean((1, 2))
    assert batch.mask.shape == (20, 16, 16)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == {(1.0, 0.25), (0.25, 1.0)}, (
        "mirrored with the image"
    )


def test_buckets_train_end_to_end(options, images, run_here, tmp_path):
    for i in range(3):
        Image.effect_noise((100 + i, 50), 30).save(images / f"wide{i}.png")
        (images / f"wide{i}.txt").write_text("noise, grey, wide")
    more = [
        "--data.captions.shuffle",
        "--data.captions.dropout=0.1",
        "--data.random_flip",
        "--data.vae_sampling=sample",
    ]
    assert run_here([*options, *more]) == 0
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_the_command_writes_a_folder_that_trains_as_the_images_do(
    options, images, run_here, tmp_path, capsys
):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for suffix in (".png", ".txt"):
        (images / f"dog{suffix}").rename(held_out / f"dog{suffix}")
    more = [f"--data.validation_path={held_out}", "--data.captions.dropout=0.2"]
    out = tmp_path / "encoded"
    assert run_here(["export-dataset", *options, *more, f"--out={out}"]) == 0
    assert f"wrote 4 samples to {out}" in capsys.readouterr().out
    assert run_here(["export-dataset", *options, *more, f"--out={out}"]) == 2
    assert run_here([*options, *more]) == 0
    first = json.loads((tmp_path / "out" / "loss.json").read_text())
    shutil.rmtree(images)
    shutil.rmtree(tmp_path / "out")
    again = [option for option in options if not option.startswith("--data.path")]
    assert run_here([*again, f"--data.path={out}", "--data.captions.dropout=0.2"]) == 0
    assert json.loads((tmp_path / "out" / "loss.json").read_text()) == first, (
        "what was held out is still held out"
    )


def test_held_out_rows_never_train(build, images, tmp_path):
    """Whether they are of an encoded folder, copies with other captions, or the only ones there are."""
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for suffix in (".png", ".txt"):
        (images / f"dog{suffix}").rename(held_out / f"dog{suffix}")
    out = tmp_path / "encoded"
    first = build(path=str(images), validation_path=str(held_out), random_flip=True, export=out)
    again = build(path=str(out), random_flip=True, validation_fraction=0.3)
    names = {again.validation.name(row) for row in range(len(again.validation))}
    assert "dog.png" in names
    assert len(again.train) + len(again.validation) == 4
    assert first.validation.latents(0).numpy().tobytes() not in by_latents(again)
    for name in ("cat", "owl", "tiger"):
        shutil.copy(images / f"{name}.png", images / f"{name}2.png")
        (images / f"{name}2.txt").write_text("again")
    twice = build(path=str(images), validation_fraction=0.3)
    assert (len(twice.train), len(twice.validation)) == (4, 2)
    assert twice.validation.latents(0).equal(twice.validation.latents(1))
    for file in images.glob("*.png"):
        file.write_bytes(b"bad")
    with pytest.raises(DataError, match="no image is left to train on"):
        build(path=str(images), validation_path=str(held_out), on_error="skip")


def test_an_image_that_changes_while_it_is_read_is_not_stored(build, images, monkeypatch):
    from data.precompute import encode

    plan = encode.encode_media

    def changed(*arguments):
        shutil.copy(images / "dog.png", images / "cat.png")
        plan(*arguments)

    monkeypatch.setattr(encode, "encode_media", changed)
    with pytest.raises(
        DataError, match=r"cat\.png: has changed since it was checked\. Run the command again"
    ):
        build(path=str(images))


def test_what_nothing_is_drawn_for_is_shown_with_its_own_caption(build, images, family):
    (images / "cat.txt").write_text("cat, face, animal")
    built = build(
        path=str(images), caption_tag_dropout=0.5, caption_shuffle=True, caption_trigger="sks"
    )
    row = [built.train.name(row) for row in range(4)].index("cat.png")
    expected = family.encode_prompt(family.load_encoders("text"), ["sks, cat, face, animal"])[0]
    torch.testing.assert_close(
        built.train.cond(row)["prompt_embeds"], expected["prompt_embeds"], rtol=1e-4, atol=1e-4
    )
    batch = make_batch(built.train, [row], [1], range(1), torch.tensor([0.5]))
    assert batch.cond["prompt_embeds"][0].equal(built.train.cond(row)["prompt_embeds"])


def test_conditioning_unlike_the_empty_prompts_is_never_dropped(build, tmp_path, capsys):
    none = {"pooled_output": None}
    samples = [
        (torch.randn(4, 16, 16), torch.randn(1, 24 * (1 + i % 2), 96), none) for i in range(4)
    ]
    write_folder(tmp_path / "mixed", samples)
    built = build(path=str(tmp_path / "mixed"), caption_dropout=0.5)
    note = "note: the conditioning of 2 samples has another form than that of the empty prompt"
    assert note in capsys.readouterr().out
    assert sorted(built.train.samples["caption_dropout"].tolist()) == [0, 0, 0.5, 0.5]
    for bucket in built.train.buckets:
        rows = [row for s in bucket for row in range(s.first, s.first + s.count)]
        for seed in range(20):
            make_batch(built.train, rows, [seed + 100 * row for row in rows], range(len(rows)))


def test_rows_with_and_without_masks_are_kept_apart(build, images, tmp_path):
    for name in ("cat", "dog", "owl"):
        Image.new("L", (64, 64), 255).save(images / f"{name}_mask.png")
    with pytest.raises(DataError, match=r"tiger\.png: no mask"):
        build(path=str(images), masks="files")
    built = build(path=str(images), masks="files", on_error="skip")
    assert len(built.train) == 3
    batch = make_batch(built.train, [0, 1, 2], [0, 1, 2], range(3))
    assert batch.mask.equal(torch.ones(3, 16, 16))


def test_an_encoded_folder_is_not_written_to(build, images, tmp_path):
    build(path=str(images), export=tmp_path / "encoded")
    shutil.copytree(tmp_path / "encoded", tmp_path / "copied", copy_function=shutil.copy)
    before = {
        path: path.read_bytes() for path in (tmp_path / "copied").rglob("*") if path.is_file()
    }
    build(path=str(tmp_path / "copied"))
    assert {
        path: path.read_bytes() for path in (tmp_path / "copied").rglob("*") if path.is_file()
    } == before
