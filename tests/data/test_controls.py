"""Control images of edit models: where they come from, how they are stored, and what is wrong with them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_cases import data_config, source_config
from helpers.families import flux2_klein, qwen_image_edit_plus
from helpers.family_cases import Case, family_of
from PIL import Image

from common.errors import DataError, ModelError
from common.process import ProcessInfo
from data.batches import MicroBatches, make_batch
from data.config import DataConfig
from data.dataset import LatentDataset
from data.export import write_dataset
from data.precompute.build import DatasetBuilder, Datasets
from data.precompute.controls import control_images, encode_controls
from data.schedule import Schedule
from data.sources.comfy_shards import read_conditioning
from data.sources.control_files import in_columns

KLEIN = flux2_klein.PLAIN
PLUS = qwen_image_edit_plus.CASE
PROCESS = ProcessInfo(index=0, count=1, device=torch.device("cpu"))


def save(path: Path, size: tuple[int, int], level: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 10, 200)).save(path)
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Two images with captions; the control images are in folders of their own."""
    for level, name in ((30, "cat"), (60, "dog")):
        save(tmp_path / "images" / f"{name}.png", (32, 32), level)
        (tmp_path / "images" / f"{name}.txt").write_text(f"make the {name} red")
        save(tmp_path / "before" / f"{name}.png", (96, 64), level)
        save(tmp_path / "pose" / f"{name}_0.jpg", (64, 128))
        save(tmp_path / "pose" / f"{name}_1.jpg", (128, 64))
    return tmp_path


def build(pairs: Path, case: Case = KLEIN, **options: Any) -> Datasets:
    config = config_of(pairs, **options)
    with DatasetBuilder.opened(config, family_of(case), PROCESS) as builder:
        return builder.encode(builder.plan(only_square=False))


def config_of(pairs: Path, **options: Any) -> DataConfig:
    return data_config(
        path=str(pairs / "images"), cache_dir=str(pairs / "cache"), resolution=32, **options
    )


def sizes(dataset: LatentDataset, row: int = 0) -> dict[str, tuple[int, int]]:
    """Height and width of the latents of each control image."""
    return {
        name: tuple(tensor.shape[-2:])
        for name, tensor in dataset.cond(row).items()
        if name.startswith("control_")
    }


def schedule_of(train: LatentDataset) -> Schedule:
    return Schedule(train.buckets, batch_size=2, seed=0, content_hash=train.content_hash)


class TestWhereTheyComeFrom:
    def test_folders_give_them_in_their_order_and_by_number(self, pairs):
        folders = (str(pairs / "before"), str(pairs / "pose"))
        train = build(pairs, control_paths=folders).train
        # a latent is 8 pixels
        assert sizes(train) == {"control_0": (8, 12), "control_1": (16, 8), "control_2": (8, 16)}

    def test_they_may_be_next_to_the_image(self, pairs):
        for name in ("cat", "dog"):
            save(pairs / "images" / f"{name}_control.png", (96, 64))
            save(pairs / "images" / f"{name}_control_1.png", (64, 128))
        train = build(pairs).train
        assert len(train) == 2
        assert sizes(train) == {"control_0": (8, 12), "control_1": (16, 8)}

    def test_sub_folders_correspond(self, pairs):
        save(pairs / "images" / "more" / "cat.png", (32, 32), level=1)
        (pairs / "images" / "more" / "cat.txt").write_text("make it red")
        save(pairs / "before" / "more" / "cat.png", (128, 128))
        train = build(pairs, control_paths=(str(pairs / "before"),)).train
        found = sorted(sizes(train, row)["control_0"] for row in range(3))
        assert found == [(8, 12), (8, 12), (16, 16)]

    def test_a_metadata_file_names_them(self, pairs):
        rows = [
            {"file_name": "cat.png", "text": "a", "control_image": "../before/cat.png"},
            {"file_name": "dog.png", "text": "b", "control_image": ["../pose/dog_0.jpg", "../before/dog.png"]},
        ]  # fmt: skip
        for text_file in (pairs / "images").glob("*.txt"):
            text_file.unlink()
        lines = "\n".join(json.dumps(row) for row in rows)
        (pairs / "images" / "metadata.jsonl").write_text(lines)
        train = build(pairs).train
        found = {train.name(row): sizes(train, row) for row in range(2)}
        assert found["cat.png"] == {"control_0": (8, 12)}
        assert found["dog.png"] == {"control_0": (16, 8), "control_1": (8, 12)}

    @pytest.mark.parametrize("is_list", [False, True], ids=["image", "list"])
    def test_a_dataset_has_columns_of_them(self, pairs, tmp_path, is_list):
        import datasets

        before = [Image.open(pairs / "before" / f"{name}.png") for name in ("cat", "dog")]
        columns = {
            "image": [Image.open(pairs / "images" / f"{name}.png") for name in ("cat", "dog")],
            "text": ["a", "b"],
            "control_image": [[image] * 2 for image in before] if is_list else before,
        }
        feature = datasets.Image()
        features = datasets.Features({
            "image": feature, "text": datasets.Value("string"),
            "control_image": datasets.List(feature) if is_list else feature,
        })  # fmt: skip
        datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "table"))
        config = data_config(
            path=str(tmp_path / "table"), cache_dir=str(tmp_path / "cache"), resolution=32
        )
        with DatasetBuilder.opened(config, family_of(KLEIN), PROCESS) as builder:
            train = builder.encode(builder.plan(only_square=False)).train
        expected = {"control_0": (8, 12), "control_1": (8, 12)}
        assert sizes(train) == (expected if is_list else {"control_0": (8, 12)})

    def test_a_folder_of_them_may_be_in_the_folder_of_images(self, pairs):
        (pairs / "before").rename(pairs / "images" / "before")
        train = build(pairs, control_paths=(str(pairs / "images" / "before"),)).train
        assert len(train) == 2

    def test_another_source_may_have_none(self, pairs):
        sources = (
            source_config(str(pairs / "images"), control_paths=(str(pairs / "before"),)),
            source_config(str(pairs / "pose"), caption_text="a pose", control_paths=()),
        )
        config = data_config(sources=sources, cache_dir=str(pairs / "cache"), resolution=32)
        with DatasetBuilder.opened(config, family_of(KLEIN), PROCESS) as builder:
            train = builder.encode(builder.plan(only_square=False)).train
        counts = sorted(len(sizes(train, row)) for row in range(len(train)))
        assert counts == [0, 0, 0, 0, 1, 1]
        for bucket in train.buckets:
            rows = [
                row
                for segment in bucket
                for row in range(segment.first, segment.first + segment.count)
            ]
            assert len({tuple(sizes(train, row)) for row in rows}) == 1, "one batch has one kind"


class TestEncoding:
    def test_a_changed_control_image_is_encoded_again(self, pairs):
        folders = (str(pairs / "before"),)
        first = build(pairs, control_paths=folders)
        assert (first.encoded_images, first.encoded_captions) == (2, 2)
        again = build(pairs, control_paths=folders)
        assert (again.encoded_images, again.encoded_captions) == (0, 0)
        save(pairs / "before" / "cat.png", (96, 64), level=200)
        changed = build(pairs, control_paths=folders)
        assert (changed.encoded_images, changed.encoded_captions) == (1, 0)
        assert changed.train.content_hash != first.train.content_hash

    def test_captions_that_are_seen_with_images_follow_them(self, pairs):
        folders = (str(pairs / "before"),)
        first = build(pairs, PLUS, control_paths=folders)
        assert (first.encoded_images, first.encoded_captions) == (2, 2)
        save(pairs / "before" / "cat.png", (96, 64), level=200)
        changed = build(pairs, PLUS, control_paths=folders)
        assert (changed.encoded_images, changed.encoded_captions) == (1, 1)

    def test_one_caption_is_encoded_for_each_control_image(self, pairs):
        for text_file in (pairs / "images").glob("*.txt"):
            text_file.write_text("make it red")
        save(pairs / "before" / "dog.png", (96, 64), level=99)
        assert build(pairs, PLUS, control_paths=(str(pairs / "before"),)).encoded_captions == 2
        assert build(pairs, KLEIN, control_paths=(str(pairs / "before"),)).encoded_captions == 1

    def test_the_empty_prompt_is_seen_with_the_images_too(self, pairs):
        datasets = build(pairs, PLUS, control_paths=(str(pairs / "before"),), caption_dropout=0.25)
        train = datasets.train
        assert datasets.encoded_captions == 4
        assert not train.samples["caption_dropout"].any()
        np.testing.assert_allclose(sorted(train.caption_probabilities), [0.25, 0.25, 0.75, 0.75])
        family = family_of(PLUS)
        encoders = family.load_encoders("text")
        with Image.open(pairs / "before" / "cat.png") as image, torch.no_grad():
            expected = family.encode_with_controls(encoders, "", [image.convert("RGB")])
        stored = [train.text.read_row(row_id) for row_id in train.caption_ids.tolist()]
        assert any(
            row["prompt_embeds"].shape == expected["prompt_embeds"].shape
            and row["prompt_embeds"].equal(expected["prompt_embeds"])
            for row in stored
        )

    def test_mirrored_images_have_mirrored_control_images(self, pairs):
        gradient = Image.linear_gradient("L").rotate(90).resize((64, 64)).convert("RGB")
        for name in ("cat", "dog"):
            gradient.save(pairs / "before" / f"{name}.png")
        train = build(pairs, control_paths=(str(pairs / "before"),), random_flip=True).train
        original, mirrored = (
            train.media.read_row(row_id)["control_0"]
            for row_id in train.samples["media"][0].tolist()
        )
        content = (pairs / "before" / "cat.png").read_bytes()
        family = family_of(KLEIN)
        encoders = family.load_encoders("media")
        for latents, flip in ((original, False), (mirrored, True)):
            images = control_images(DataConfig(), family, [content], flip)
            assert encode_controls(family, encoders, images, PROCESS.device)["control_0"].equal(
                latents
            )
        assert not original.equal(mirrored)

    def test_less_pixels_take_less_memory(self, pairs):
        save(pairs / "before" / "cat.png", (512, 256))
        folders = (str(pairs / "before"),)
        assert (32, 64) in [
            sizes(build(pairs, control_paths=folders).train, row)["control_0"] for row in range(2)
        ]
        train = build(pairs, control_paths=folders, control_pixels=128 * 64).train
        found = sorted(sizes(train, row)["control_0"] for row in range(2))
        assert found == [(8, 12), (8, 16)]

    def test_data_for_comfyui_have_reference_latents(self, pairs):
        folders = (str(pairs / "before"), str(pairs / "pose"))
        config = config_of(pairs, control_paths=folders)
        family = family_of(KLEIN)
        with DatasetBuilder.opened(config, family, PROCESS) as builder:
            datasets = builder.encode(builder.plan(only_square=False))
            for form in ("comfyui", "safetensors"):
                write_dataset(builder, datasets, pairs / form, form)
        for form in ("comfyui", "safetensors"):
            config = data_config(
                path=str(pairs / form), cache_dir=str(pairs / "other"), resolution=32
            )
            with DatasetBuilder.opened(config, family, PROCESS) as builder:
                back = builder.encode(builder.plan(only_square=False)).train
            assert len(back) == 2
            written = [datasets.train.cond(row) for row in range(2)]
            for row in range(2):
                stored = back.cond(row)
                assert any(
                    all(
                        stored[f"control_{number}"].equal(cond[f"control_{number}"])
                        for number in range(3)
                    )
                    for cond in written
                )


class TestBatches:
    def test_a_batch_has_all_control_images(self, pairs):
        train = build(pairs, control_paths=(str(pairs / "before"),)).train
        batch = make_batch(train, [0, 1], [3, 4], range(2))
        assert batch.cond["control_0"].shape == (2, 128, 8, 12)

    def test_dropped_control_images_are_a_function_of_the_step(self, pairs):
        train = build(pairs, control_paths=(str(pairs / "before"),), control_dropout=0.5).train
        batches = MicroBatches(train, schedule_of(train))
        dropped = ["control_0" not in batches[number].cond for number in range(64)]
        assert 20 < sum(dropped) < 44
        assert dropped == ["control_0" not in batches[number].cond for number in range(64)]

    def test_nothing_is_dropped_by_default(self, pairs):
        train = build(pairs, control_paths=(str(pairs / "before"),)).train
        batches = MicroBatches(train, schedule_of(train))
        assert all("control_0" in batches[number].cond for number in range(64))


class TestErrors:
    def test_all_missing_control_images_are_named(self, pairs):
        (pairs / "before" / "cat.png").unlink()
        (pairs / "before" / "dog.png").unlink()
        with pytest.raises(DataError) as error:
            build(pairs, control_paths=(str(pairs / "before"),))
        for name in ("cat", "dog"):
            assert f"{name}.png: no control image {name}.<extension>" in str(error.value)

    def test_a_model_that_edits_needs_one(self, pairs):
        with pytest.raises(DataError, match="2 errors") as error:
            build(pairs, PLUS)
        assert "cat.png: no control image, which this model needs" in str(error.value)

    def test_a_model_takes_so_many(self, pairs):
        folders = (str(pairs / "pose"), str(pairs / "pose"))
        with pytest.raises(DataError, match="4 control images; this model takes at most 3"):
            build(pairs, PLUS, control_paths=folders)

    def test_a_damaged_control_image_is_named(self, pairs):
        (pairs / "before" / "cat.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"control image .*before/cat.png: not an image"):
            build(pairs, control_paths=(str(pairs / "before"),))

    def test_two_files_of_one_name_are_an_error(self, pairs):
        save(pairs / "before" / "cat.jpg", (64, 64))
        with pytest.raises(
            DataError, match=r"several files for one control image, cat.jpg and cat.png"
        ):
            build(pairs, control_paths=(str(pairs / "before"),))

    @pytest.mark.parametrize(
        "options", [{"control_paths": ("x",)}, {"control_dropout": 0.1}, {"control_pixels": 4096}]
    )
    def test_other_models_have_no_use_for_the_options(self, pairs, options):
        from helpers.families import z_image

        with pytest.raises(DataError, match="z_image take no control images"):
            build(pairs, z_image.CASE, **options)

    def test_a_model_that_needs_one_cannot_drop_it(self, pairs):
        with pytest.raises(DataError, match="always need a control image"):
            build(pairs, PLUS, control_dropout=0.5)

    def test_control_images_of_other_models_are_not_trained_on(self, pairs, capsys):
        from helpers.families import z_image

        save(pairs / "images" / "cat_control.png", (64, 64))
        assert len(build(pairs, z_image.CASE).train) == 2
        assert (
            "1 image has control images, which this model does not take" in capsys.readouterr().out
        )

    def test_bad_reference_latents_are_named(self, pairs):
        family = family_of(KLEIN)
        cond = torch.zeros(1, 4, family.cond_width)
        with pytest.raises(ModelError, match="reference_latents"):
            family.comfy.read(cond, {"reference_latents": [io.BytesIO()]})


def test_the_summary_counts_control_images(pairs):
    from training.summary import control_lines

    train = build(pairs, control_paths=(str(pairs / "before"), str(pairs / "pose"))).train
    assert control_lines(train, True) == ["controls    2 with 3 control images, in 1 bucket"]
    assert control_lines(build(pairs).train, True) == [
        "controls    2 with no control image, in 1 bucket"
    ]
    assert control_lines(build(pairs).train, False) == []


class TestReadersFindings:
    """Mistakes that readers of the code made, or saw."""

    def test_validation_images_have_their_own_folders(self, pairs):
        save(pairs / "held" / "cat.png", (32, 32), level=7)
        (pairs / "held" / "cat.txt").write_text("make it red")
        save(pairs / "held_before" / "cat.png", (128, 128))
        options = {
            "control_paths": (str(pairs / "before"),),
            "validation_path": str(pairs / "held"),
        }
        held_out = build(pairs, **options).validation
        assert sizes(held_out) == {}, "not those of the training images"
        options["validation_control_paths"] = (str(pairs / "held_before"),)
        assert sizes(build(pairs, **options).validation) == {"control_0": (16, 16)}

    def test_an_image_that_changes_before_it_is_encoded(self, pairs, monkeypatch):
        config = config_of(pairs, control_paths=(str(pairs / "before"),))
        with DatasetBuilder.opened(config, family_of(PLUS), PROCESS) as builder:
            plan = builder.plan(only_square=False)
            save(pairs / "before" / "cat.png", (96, 64), level=222)
            with pytest.raises(DataError, match=r"cat\.png: has changed since it was checked"):
                builder.encode(plan)
        assert build(pairs, PLUS, control_paths=(str(pairs / "before"),)).encoded_captions >= 1

    def test_only_some_rows_of_a_metadata_file_name_one(self, pairs):
        for text_file in (pairs / "images").glob("*.txt"):
            text_file.unlink()
        rows = [
            {"file_name": "cat.png", "text": "a"},
            {"file_name": "dog.png", "text": "b", "control_image": "../before/dog.png"},
        ]
        (pairs / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        train = build(pairs).train
        found = {train.name(row): sizes(train, row) for row in range(2)}
        assert found == {"cat.png": {}, "dog.png": {"control_0": (8, 12)}}

    def test_a_metadata_file_above_both_folders(self, pairs):
        for text_file in (pairs / "images").glob("*.txt"):
            text_file.unlink()
        rows = [
            {"file_name": f"images/{name}.png", "text": "a", "control_image": f"before/{name}.png"}
            for name in ("cat", "dog")
        ]
        shutil.rmtree(pairs / "pose")
        (pairs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = data_config(path=str(pairs), cache_dir=str(pairs / ".cache"), resolution=32)
        with DatasetBuilder.opened(config, family_of(KLEIN), PROCESS) as builder:
            train = builder.encode(builder.plan(only_square=False)).train
        assert len(train) == 2
        assert sizes(train) == {"control_0": (8, 12)}

    def test_options_without_effect_are_errors(self, pairs):
        with pytest.raises(DataError, match=r"which --data\.control_columns pose needs"):
            build(pairs, control_columns=("pose",))
        import datasets

        image = datasets.Image()
        features = datasets.Features({"image": image, "text": datasets.Value("string")})
        rows = {"image": [Image.open(pairs / "images" / "cat.png")], "text": ["a"]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(str(pairs / "table"))
        config = data_config(
            path=str(pairs / "table"), cache_dir=str(pairs / "cache"), control_paths=("before",)
        )
        with (
            pytest.raises(DataError, match=r"has no effect on .*table, whose kind is dataset"),
            DatasetBuilder.opened(config, family_of(KLEIN), PROCESS),
        ):
            pass

    def test_numbers_of_other_images_are_not_control_images(self, pairs):
        for name in ("cat", "cat_1", "cat_2"):
            save(pairs / "images" / f"{name}.png", (32, 32))
            (pairs / "images" / f"{name}.txt").write_text("x")
        for name in ("dog", "cat_1", "cat_2"):
            save(pairs / "only" / f"{name}.png", (64, 64))
        with pytest.raises(DataError, match="1 error") as error:
            build(pairs, control_paths=(str(pairs / "only"),))
        assert "cat.png: no control image" in str(error.value)

    def test_numbers_have_no_gap(self, pairs):
        (pairs / "pose" / "cat_0.jpg").rename(pairs / "pose" / "cat_3.jpg")
        with pytest.raises(DataError, match=r"have a gap: cat_1.jpg, cat_3.jpg"):
            build(pairs, control_paths=(str(pairs / "pose"),))

    def test_the_name_of_the_image_is_number_0(self, pairs):
        (pairs / "pose" / "cat_0.jpg").rename(pairs / "pose" / "cat.jpg")
        train = build(pairs, control_paths=(str(pairs / "pose"),)).train
        assert sizes(train) == sizes(train, 1) == {"control_0": (16, 8), "control_1": (8, 16)}
        save(pairs / "pose" / "cat_0.jpg", (32, 64))
        with pytest.raises(
            DataError, match=r"several files for one control image, cat.jpg and cat_0.jpg"
        ):
            build(pairs, control_paths=(str(pairs / "pose"),))

    def test_a_control_image_without_its_image(self, pairs):
        save(pairs / "images" / "bird_control.png", (32, 32))
        with pytest.raises(
            DataError, match=r"bird_control\.png: a control image by its name, but no"
        ):
            build(pairs, caption_text="make it grey")

    def test_the_folder_of_the_images_has_no_control_images(self, pairs):
        with pytest.raises(DataError, match="is the folder of the images"):
            build(pairs, control_paths=(str(pairs / "images"),))

    def test_a_control_image_of_another_sub_folder_is_not_taken(self, pairs):
        save(pairs / "images" / "s1" / "cat.png", (32, 32))
        (pairs / "images" / "s1" / "cat.txt").write_text("x")
        save(pairs / "before" / "s2" / "cat.png", (64, 64))
        with pytest.raises(DataError, match=r"s1/cat.png: no control image"):
            build(pairs, control_paths=(str(pairs / "before"),))

    def test_no_cell_is_empty_before_another(self):
        row = {"pose": None, "product": "a.png"}
        with pytest.raises(DataError, match="no control image in pose, but one in product"):
            in_columns(row, ["pose", "product"], Path())
        with pytest.raises(DataError, match="no file names"):
            in_columns({"pose": 0}, ["pose"], Path())
        with pytest.raises(DataError, match="is not in"):
            in_columns({"pose": "x" * 300}, ["pose"], Path())
        assert in_columns({"pose": "", "product": None}, ["pose", "product"], Path()) == []

    def test_an_empty_list_of_folders_means_none(self, pairs):
        save(pairs / "images" / "cat_control.png", (64, 64))
        assert sizes(build(pairs, control_paths=()).train) == {}

    def test_a_file_with_its_own_caption_is_a_training_image(self, pairs):
        save(pairs / "images" / "cat_control.png", (64, 64), level=99)
        (pairs / "images" / "cat_control.txt").write_text("a remote control")
        assert len(build(pairs).train) == 3

    def test_letters_of_the_suffix_do_not_matter(self, pairs):
        save(pairs / "images" / "cat_CONTROL.PNG", (96, 64))
        train = build(pairs).train
        assert [len(sizes(train, row)) for row in range(2)].count(1) == 1

    def test_two_files_with_one_number_next_to_the_image(self, pairs):
        save(pairs / "images" / "cat_control.png", (64, 64))
        save(pairs / "images" / "cat_control_0.png", (64, 64))
        with pytest.raises(DataError, match="several files for one control image"):
            build(pairs)

    def test_a_dangling_link_is_an_error_of_its_image(self, pairs):
        (pairs / "before" / "cat.png").unlink()
        (pairs / "before" / "cat.png").symlink_to(pairs / "nowhere.png")
        with pytest.raises(DataError, match=r"before/cat.png: cannot be read"):
            build(pairs, control_paths=(str(pairs / "before"),))
        skipping = build(pairs, control_paths=(str(pairs / "before"),), on_error="skip")
        assert len(skipping.train) == 1

    def test_sizes_that_pipelines_refuse(self, pairs):
        family = family_of(KLEIN)
        assert family.control_error(64, 512) is None
        assert "sides of at least 64" in family.control_error(63, 512)
        assert "at most 8 times" in family.control_error(64, 513)
        assert "at most 200 times" in family_of(PLUS).control_error(1, 201)

    def test_random_flip_is_refused_if_the_text_encoder_sees_the_images(self, pairs):
        with pytest.raises(DataError, match="would see them unmirrored"):
            build(pairs, PLUS, control_paths=(str(pairs / "before"),), random_flip=True)

    def test_the_background_is_part_of_what_the_text_encoder_sees(self, pairs):
        folders = (str(pairs / "before"),)
        build(pairs, PLUS, control_paths=folders)
        assert build(pairs, PLUS, control_paths=folders, background="black").encoded_captions == 2

    def test_reference_latents_must_fit(self):
        family = family_of(KLEIN)
        cond = torch.zeros(1, 4, family.cond_width)
        fitting = torch.zeros(1, 128, 4, 4)
        assert "control_0" in read_conditioning(family, cond, {"reference_latents": [fitting]})
        for bad, message in (
            (fitting, "not a list"),
            ([torch.zeros(1, 16, 4, 4)], "expected 128 channels"),
            ([torch.zeros(1, 128, 2, 4, 4)], "2 frames"),
            ([fitting] * 11, "takes at most 10"),
        ):
            with pytest.raises((DataError, ModelError), match=message):
                read_conditioning(family, cond, {"reference_latents": bad})
        from helpers.families import z_image

        other = family_of(z_image.CASE)
        latents = torch.zeros(1, 16, 4, 4)
        with pytest.raises(DataError, match="takes none"):
            read_conditioning(
                other, torch.zeros(1, 4, other.cond_width), {"reference_latents": [latents]}
            )
