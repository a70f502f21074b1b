"""Folders that ComfyUI encoded: read as it writes them, written as it writes them, and no bad one read in silence."""

import json
import os
import pickle
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ldm import save_single_file
from helpers.project import BASE
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.memory import anonymous_memory
from common.errors import DataError, ModelError
from data.sources.comfy_shards import (
    ShardEntry,
    is_comfy_folder,
    read_samples,
    scan_folder,
    shard_paths,
)
from data.sources.comfy_writer import write_folder
from models import family_classes
from models.base import ModelFamily
from models.config import ModelConfig
from models.detect import get_family

WIDTH = 96  # of the embedded model's conditioning
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return get_family(ModelConfig(path=str(BASE)))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def conditioning(
    length: int = 77, width: int = WIDTH, count: int = 1, dtype: torch.dtype = torch.float32
) -> list:
    """What CLIPTextEncode gives for one text, or `count` of them as ResolutionBucket joins them."""
    pairs = range(count)
    return [
        [random(1, length, width, dtype=dtype), {"pooled_output": random(1, 768, dtype=dtype)}]
        for _ in pairs
    ]


def save(path: Path, latents: object, conditioning: object) -> None:
    """One shard, the way SaveTrainingDataset saves it."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        torch.save({"latents": latents, "conditioning": conditioning}, file)


def node_saves(folder: Path, latents: list, conditioning: list, shard_size: int = 1000) -> None:
    """What SaveTrainingDataset does."""
    starts = range(0, len(latents), shard_size)
    for number, start in enumerate(starts):
        part = slice(start, start + shard_size)
        save(folder / f"shard_{number:04d}.pkl", latents[part], conditioning[part])
    counts = {"num_samples": len(latents), "num_shards": len(starts), "shard_size": shard_size}
    with open(folder / "metadata.json", "w") as file:
        json.dump(counts, file, indent=2)


def read(folder: Path, family: ModelFamily) -> list:
    """All samples, after a scan that found nothing wrong and the same samples."""
    entries, faults, warned = scan_folder(folder, family)
    assert (faults, warned) == ([], [])
    found = [
        (file.name, sample)
        for file in shard_paths(folder)
        for sample in read_samples(folder, family, file.name)
    ]
    assert entries == [
        ShardEntry(name, sample.index, *sample.latents.shape[1:]) for name, sample in found
    ]
    return [sample for _, sample in found]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_the_node_saves(tmp_path, family, dtype):
    latents = [{"samples": random(1, 4, 8 + i, 6, dtype=dtype)} for i in range(5)]
    conds = [conditioning(77 * (1 + i % 2), dtype=dtype) for i in range(5)]
    node_saves(tmp_path / "set", latents, conds, shard_size=2)
    found = read(tmp_path / "set", family)
    assert [sample.name for sample in found] == [
        f"shard_000{i // 2}.pkl sample {i % 2}" for i in range(5)
    ]  # the last shard has one
    for sample, latent, cond in zip(found, latents, conds, strict=True):
        assert same(sample.latents, latent["samples"][0])
        assert sample.cond.keys() == {"prompt_embeds"}
        assert same(sample.cond["prompt_embeds"], cond[0][0][0])


def test_buckets_are_split_into_samples(tmp_path, family):
    latents = [
        {"samples": random(3, 4, 8, 8)},
        {"samples": random(1, 4, 6, 10)},
        {"samples": random(2, 4, 4, 4)},
    ]
    conds = [
        conditioning(count=3),
        conditioning(),
        conditioning(count=1),
    ]  # the last bucket's two have one text
    node_saves(tmp_path / "set", latents, conds)
    found = read(tmp_path / "set", family)
    assert [sample.index for sample in found] == list(range(6))
    for i in range(3):
        assert same(found[i].latents, latents[0]["samples"][i])
        assert same(found[i].cond["prompt_embeds"], conds[0][i][0][0])
    assert same(found[3].latents, latents[1]["samples"][0])
    assert same(found[5].latents, latents[2]["samples"][1])
    assert same(found[5].cond["prompt_embeds"], conds[2][0][0][0])


def test_one_conditioning_is_that_of_all(tmp_path, family):
    one = conditioning()
    save(
        tmp_path / "set" / "shard_0000.pkl",
        [{"samples": random(1, 4, 8, 8)} for _ in range(3)],
        [one],
    )
    found = read(tmp_path / "set", family)
    assert len(found) == 3
    assert all(same(sample.cond["prompt_embeds"], one[0][0][0]) for sample in found)


def test_of_scheduled_conditioning_the_first_is_taken_and_that_is_said(tmp_path, family):
    scheduled = conditioning(count=2)
    save(
        tmp_path / "shard_0000.pkl",
        [{"samples": random(1, 4, 8, 8)}] * 3,
        [scheduled, conditioning(), scheduled],
    )
    entries, faults, warned = scan_folder(tmp_path, family)
    assert (len(entries), faults, len(warned)) == (3, [], 1)
    assert "shard_0000.pkl samples 0, 2: 2 elements of conditioning" in warned[0]
    first = next(read_samples(tmp_path, family, "shard_0000.pkl"))
    assert same(first.cond["prompt_embeds"], scheduled[0][0][0])


def test_a_folder_is_known_by_its_shards(tmp_path, family):
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "part.pkl").write_bytes(b"")
    assert not is_comfy_folder(tmp_path)
    assert not is_comfy_folder(tmp_path / "absent")
    assert "no shard" in scan_folder(tmp_path, family)[1][0]
    for name in ("shard_0000.safetensors", "shard_7.pkl"):
        (tmp_path / name).write_bytes(b"")
        assert is_comfy_folder(tmp_path)
        (tmp_path / name).unlink()


GOOD = {"samples": torch.zeros(1, 4, 8, 8)}
BAD_SAMPLES = [  # latents, conditioning, what is said
    (
        {"samples": torch.zeros(1, 16, 8, 8)},
        conditioning(),
        "latents of 16 channels, of another model",
    ),
    (
        {"samples": torch.zeros(1, 4, 21, 8, 8)},
        conditioning(),
        "shape (1, 4, 21, 8, 8): this model makes images",
    ),
    (
        {"samples": torch.zeros(4, 8, 8)},
        conditioning(),
        "latents of shape (4, 8, 8), not (1, C, h, w)",
    ),
    ({"samples": torch.zeros(0, 4, 8, 8)}, conditioning(), "latents of shape (0, 4, 8, 8)"),
    (
        {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.int32)},
        conditioning(),
        "latents that are not",
    ),
    ({"images": torch.zeros(1, 4, 8, 8)}, conditioning(), "latents that are not"),
    (torch.zeros(1, 4, 9, 9), conditioning(), "latents that are not"),
    (GOOD, [], "no conditioning"),
    (GOOD, [[torch.zeros(1, 77, WIDTH)]], "conditioning that is not"),
    (GOOD, [[None, {}]], "conditioning that is not"),
    (
        GOOD,
        [[torch.zeros(1, 77, 2048), {}]],
        "conditioning of width 2048 (SDXL); this model takes width 96",
    ),
    (GOOD, [[torch.zeros(2, 77, WIDTH), {}]], "conditioning of shape (2, 77, 96)"),
    (
        {"samples": torch.zeros(3, 4, 8, 8)},
        conditioning(count=2),
        "3 latents in a bucket, but 2 conditionings",
    ),
]


def test_all_faults_of_all_shards_are_listed_and_the_good_samples_kept(tmp_path, family):
    latents, conds = [[GOOD, *(bad[i] for bad in BAD_SAMPLES), GOOD] for i in (0, 1)]
    conds[0] = conds[-1] = conditioning()
    save(tmp_path / "shard_0000.pkl", latents, conds)
    save(tmp_path / "shard_0001.pkl", [GOOD] * 3, [conditioning()] * 2)
    save(tmp_path / "shard_0002.pkl", [GOOD] * 2, [])
    save(tmp_path / "shard_0003.pkl", [], [])
    torch.save([1, 2], tmp_path / "shard_0004.pkl")
    save(tmp_path / "shard_0005.pkl", [GOOD] * 1000, [[[torch.zeros(1, 77, 3584), {}]]])
    (tmp_path / "shard_0006.pkl").write_bytes((tmp_path / "shard_0000.pkl").read_bytes()[:-100])
    save(
        tmp_path / "shard_0007.pkl",
        [{"samples": torch.zeros(1, 8, 8, 8)}],
        [[[torch.zeros(1, 9, 1024), {}]]],
    )
    (tmp_path / "shard_0008.pkl").mkdir()
    save(tmp_path / "shard_0009.pkl", [GOOD], [conditioning()])
    entries, faults, warned = scan_folder(tmp_path, family)
    last = len(BAD_SAMPLES) + 3  # the bucket of three counts as three
    assert entries == [ShardEntry("shard_0000.pkl", i, 8, 8) for i in (0, last)] + [
        ShardEntry("shard_0009.pkl", 0, 8, 8)
    ]
    assert [sample.index for sample in read_samples(tmp_path, family, "shard_0000.pkl")] == [
        0,
        last,
    ]
    assert warned == []
    listed = "\n".join(faults)
    for number, what in [
        *((0, bad[2]) for bad in BAD_SAMPLES),
        (1, "3 latents, but 2 conditionings"), (2, "no conditioning"), (3, "no latents"), (4, "no latents"),
        (5, "samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more: conditioning of width 3584 (Qwen-Image,"),
        (6, "damaged"), (7, "8 channels"), (7, "1024 (SD2.1, "), (8, "unreadable"),
    ]:  # fmt: skip
        assert [
            f
            for f in faults
            if f.startswith(str(tmp_path / f"shard_000{number}.pkl")) and what in f
        ], what
    assert "shard_0000.pkl samples 5, 6, 7: latents that are not" in listed  # said once
    with pytest.raises(DataError, match=r"shard_0006\.pkl: damaged"):
        list(read_samples(tmp_path, family, "shard_0006.pkl"))


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_executed(tmp_path, family):
    executed = tmp_path / "executed"
    save(tmp_path / "shard_0000.pkl", [GOOD, Bomb(executed)], [conditioning()] * 2)
    save(
        tmp_path / "shard_0001.pkl",
        [GOOD],
        [[[torch.zeros(1, 77, WIDTH), {"hooks": Bomb(executed)}]]],
    )
    for number, protocol in ((2, 2), (3, 5)):  # the second as ComfyUI did before it used torch.save
        content = {"latents": [GOOD], "conditioning": [Bomb(executed)]}
        (tmp_path / f"shard_000{number}.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    old = {"latents": [Bomb(executed)], "conditioning": []}
    torch.save(old, tmp_path / "shard_0004.pkl", _use_new_zipfile_serialization=False)
    save(
        tmp_path / "shard_0005.pkl", [GOOD], [[[torch.zeros(1, 77, WIDTH), {"array": np.zeros(3)}]]]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of protocols, say less than the fault
        entries, faults, _ = scan_folder(tmp_path, family)
    assert entries == []
    assert not executed.exists()
    assert len(faults) == 6
    for number, fault in enumerate(faults):
        assert fault.startswith(
            f"{tmp_path}/shard_000{number}.pkl: not loaded, because it holds more than tensors"
        )
        assert "weights_only" not in fault
    assert "posix.mkdir" in faults[0]
    assert "early versions of ComfyUI" in faults[3]
    with pytest.raises(DataError, match="not loaded"):
        next(read_samples(tmp_path, family, "shard_0000.pkl"))


def test_what_another_library_lets_torch_trust_is_refused_too(tmp_path, family):
    save(
        tmp_path / "shard_0000.pkl", [GOOD], [[[torch.zeros(1, 77, WIDTH), {"when": Path("/tmp")}]]]
    )
    with torch.serialization.safe_globals([type(Path("/tmp"))]):
        _, faults, _ = scan_folder(tmp_path, family)
    assert len(faults) == 1
    assert "PosixPath" in faults[0]


def test_damage_anywhere_is_a_fault_at_most(tmp_path, family):
    node_saves(tmp_path, [{"samples": random(1, 4, 4, 4)}] * 2, [conditioning(2)] * 2)
    file = tmp_path / "shard_0000.pkl"
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 250):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        entries, faults, _ = scan_folder(tmp_path, family)
        assert entries or faults, place


def test_a_file_of_an_old_torch_is_read(tmp_path, family):
    latents, cond = random(1, 4, 8, 8), conditioning()
    shard = {"latents": [{"samples": latents}], "conditioning": [cond]}
    torch.save(shard, tmp_path / "shard_0000.pkl", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path, family)[0].latents, latents[0])


@pytest.mark.parametrize("form", ["pkl", "safetensors"])
def test_a_shard_is_mapped_not_read(tmp_path, family, form):
    made = (
        (torch.ones(4, 512, 512), torch.ones(1, 77, WIDTH), {"pooled_output": None})
        for _ in range(16)
    )
    write_folder(tmp_path / "set", made, form=form)
    size = 16 * 4 * 512 * 512 * 4
    assert shard_paths(tmp_path / "set")[0].stat().st_size > size
    read(tmp_path / "set", family)  # what is imported and allocated once
    held = [
        sample
        for file in shard_paths(tmp_path / "set")
        for sample in read_samples(tmp_path / "set", family, file.name)
    ]
    before = anonymous_memory()
    held = [
        sample
        for file in shard_paths(tmp_path / "set")
        for sample in read_samples(tmp_path / "set", family, file.name)
    ]
    assert sum(sample.latents.sum().item() for sample in held) == size / 4
    assert anonymous_memory() - before < size / 2


def triples(count: int, dtype: torch.dtype = torch.float32) -> list:
    """Samples of all kinds that a shard holds."""
    kinds = [
        {
            "pooled_output": random(1, 768, dtype=dtype),
            "guidance": 3.5,
            "width": 512,
            "name": "a.b",
        },
        {
            "pooled_output": None,
            "attention_mask": torch.ones(1, 77, dtype=torch.int64),
            "clip": [1, {"x": None}],
        },
        {"pooled_output": None, "a.b": torch.ones(()), "": random(2, 3, dtype=dtype).T, "on": True},
    ]
    return [
        (random(4, 6, 5 + i, dtype=dtype), random(1, 77, WIDTH, dtype=dtype), kinds[i % 3])
        for i in range(count)
    ]


def content(file: Path) -> dict:
    """A .pkl shard as LoadTrainingDataset loads it."""
    with open(file, "rb") as opened:
        return torch.load(opened, weights_only=True)


def test_a_written_folder_is_byte_for_byte_the_nodes(tmp_path):
    made = [(latents, cond, {"pooled_output": None}) for latents, cond, _ in triples(5)]
    assert write_folder(tmp_path / "ours", iter(made), shard_size=2) == 5
    latents = [{"samples": latents[None]} for latents, _, _ in made]
    node_saves(
        tmp_path / "nodes", latents, [[[cond, extras]] for _, cond, extras in made], shard_size=2
    )
    ours, nodes = (sorted((tmp_path / name).iterdir()) for name in ("ours", "nodes"))
    assert [file.name for file in ours] == [
        "metadata.json",
        *(f"shard_000{i}.pkl" for i in range(3)),
    ]
    assert [file.name for file in ours] == [file.name for file in nodes]
    assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in nodes]
    shard = content(ours[1])
    assert list(shard) == ["latents", "conditioning"]
    assert shard["latents"][1].keys() == {"samples"}
    assert same(shard["latents"][1]["samples"], made[1][0][None])
    ((cond, extras),) = shard["conditioning"][1]
    assert same(cond, made[1][1])
    assert extras == {"pooled_output": None}


@pytest.mark.parametrize("form", ["pkl", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read_back_exactly(tmp_path, family, dtype, form):
    made = triples(7, dtype)
    write_folder(tmp_path / "set", made, shard_size=3, form=form)
    found = read(tmp_path / "set", family)
    assert [file.name for file in shard_paths(tmp_path / "set")] == [
        f"shard_000{i}.{form}" for i in range(3)
    ]
    for sample, (latents, cond, _) in zip(found, made, strict=True):
        assert same(sample.latents, latents)
        assert same(sample.cond["prompt_embeds"], cond[0])
        back, extras = family.comfy.write(sample.cond)
        assert same(back, cond)
        assert extras == {"pooled_output": None}


@pytest.mark.parametrize("form", ["pkl", "safetensors"])
def test_extras_are_read_back_exactly(tmp_path, family, form, monkeypatch):
    made, seen = triples(4), []
    write_folder(tmp_path / "set", made, shard_size=3, form=form)
    monkeypatch.setattr(family.comfy, "read", lambda cond, extras: seen.append(extras) or {})
    for file in shard_paths(tmp_path / "set"):
        list(read_samples(tmp_path / "set", family, file.name))
    for extras, (_, _, expected) in zip(seen, made, strict=True):
        assert extras.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, Tensor):
                assert same(extras[name], value)
            else:
                assert extras[name] == value
                assert type(extras[name]) is type(value)


@pytest.mark.parametrize("form", ["pkl", "safetensors"])
def test_writing_holds_one_shard_and_nothing_else(tmp_path, form):
    folder, alive = tmp_path / "set", weakref.WeakSet()

    def made():
        for i in range(20):
            assert len(alive) <= 5
            files = list((tmp_path / ".set.partial").glob("*"))
            assert len(files) == i // 4  # a shard is written before the next is begun
            assert not folder.exists()
            whole = torch.zeros(1000, 4, 8, 8)
            alive.add(whole)
            yield whole[i], torch.zeros(1, 77, WIDTH), {"pooled_output": None}
            del whole

    assert write_folder(folder, made(), shard_size=4, form=form) == 20
    assert len(shard_paths(folder)) == 5
    assert (
        max(file.stat().st_size for file in shard_paths(folder)) < 200_000
    )  # no sample brings its whole batch along
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_never_overwritten_nor_left_half_written(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match="old exists already"):
        write_folder(tmp_path / "old", triples(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        write_folder(tmp_path / "file" / "set", triples(1))
    with pytest.raises(DataError, match="no sample"):
        write_folder(tmp_path / "set", [])
    with pytest.raises(DataError, match="a shard of 0 samples"):
        write_folder(tmp_path / "set", triples(1), shard_size=0)

    def broken():
        yield from triples(3)
        raise RuntimeError("the encoder died")

    with pytest.raises(RuntimeError, match="the encoder died"):
        write_folder(tmp_path / "set", broken(), shard_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
    (tmp_path / ".set.partial").mkdir()  # of a process that was killed
    (tmp_path / ".set.partial" / "shard_0007.pkl").write_text("")
    write_folder(tmp_path / "set", triples(1))
    assert len(shard_paths(tmp_path / "set")) == 1


def test_what_a_shard_cannot_hold_is_not_written(tmp_path):
    latents, cond = torch.zeros(4, 8, 8), torch.zeros(1, 77, WIDTH)
    for bad, form in [
        ((latents[None], cond, {}), "pkl"), ((latents, cond[0], {}), "pkl"), ((latents, cond, {"x": Path()}), "pkl"),
        ((latents, cond, {"x": np.float32(1)}), "pkl"), ((latents, cond, {1: 2}), "pkl"),
        ((latents, cond, {"x": [latents, 1]}), "safetensors"), ((latents, cond, {"x": (1, 2)}), "safetensors"),
        ((latents, cond, {"x": {1: 2}}), "safetensors"), ((latents, cond, {"x": b"1"}), "safetensors"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=r"sample 0 has|keeps no extras"):
            write_folder(tmp_path / "set", [bad], form=form)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_safetensors_shard_is_a_fault(tmp_path, family):
    latents, cond, extras = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, WIDTH), {"extras": "[{}]"}
    file = tmp_path / "shard_0000.safetensors"
    for tensors, metadata, what in [
        ({"latents.0": latents, "cond.1": cond}, extras, "without 'cond.0'"),
        ({"latents.1": latents, "cond.0": cond}, extras, "without 'latents.0'"),
        (
            {"latents.0": latents, "cond.0": cond, "unet": cond.clone()},
            extras,
            "not a shard (it holds unet)",
        ),
        ({"latents.0": latents, "cond.0": cond, "cond.3.x": cond.clone()}, extras, "not a shard"),
        ({"latents.0": latents, "cond.0": cond}, None, "without 'extras'"),
        ({"latents.0": latents, "cond.0": cond}, {"extras": "5"}, "not a shard"),
        ({"latents.0": latents}, extras, "no conditioning"),
        (
            {"latents.0": latents, "cond.0": cond[..., :5].contiguous()},
            extras,
            "sample 0: conditioning of width 5",
        ),
    ]:
        save_file(tensors, file, metadata)
        entries, faults, _ = scan_folder(tmp_path, family)
        assert (entries, len(faults)) == ([], 1), what
        assert faults[0].startswith(str(file))
        assert what in faults[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in scan_folder(tmp_path, family)[1][0]


def test_the_safetensors_form_is_as_documented(tmp_path, family):
    made = triples(2)
    write_folder(tmp_path / "set", made, form="safetensors")
    tensors = load_file(tmp_path / "set" / "shard_0000.safetensors")
    names = {
        "latents.0",
        "latents.1",
        "cond.0",
        "cond.1",
        "cond.0.pooled_output",
        "cond.1.attention_mask",
    }
    assert tensors.keys() == names
    assert same(tensors["latents.1"], made[1][0][None])
    node_saves(tmp_path / "set", [GOOD], [conditioning()])  # beside it
    assert "keep one of the two" in scan_folder(tmp_path / "set", family)[1][0]


def test_a_family_takes_its_own_conditioning_and_says_whose_another_is(tmp_path, family):
    save_single_file(BASE, tmp_path / "model.safetensors", torch.float16)
    file = get_family(ModelConfig(path=str(tmp_path / "model.safetensors"), config=str(BASE)))
    for each in (family, file):
        cond = random(1, 154, WIDTH)
        taken = each.comfy.read(cond, {"pooled_output": random(1, 768)})
        assert taken.keys() == {"prompt_embeds"}
        assert same(taken["prompt_embeds"], cond[0])
        assert same(each.comfy.write(taken)[0], cond)
        owners = [
            item for other in family_classes().values() for item in other.comfy_widths.items()
        ]
        assert len({width for width, _ in owners}) == 14
        for width, owner in owners:
            with pytest.raises(ModelError) as error:
                each.comfy.read(torch.zeros(1, 77, width), {})
            assert f"conditioning of width {width} (" in str(error.value)
            assert owner in str(error.value)
            assert "; this model takes width 96" in str(error.value)
        for shape in ((77, WIDTH), (1, 0, WIDTH), (2, 77, WIDTH)):
            with pytest.raises(ModelError, match=r"not \(1, tokens, 96\)"):
                each.comfy.read(torch.zeros(shape), {})
    encoded = family.encode_prompt(family.load_encoders("text"), ["a cat"])[0]
    cond, extras = family.comfy.write(encoded)
    assert same(family.comfy.read(cond, extras)["prompt_embeds"], encoded["prompt_embeds"])


def test_a_shard_that_contains_itself_ends(tmp_path, family):
    endless: list = []
    endless.append(endless)
    save(tmp_path / "shard_0000.pkl", [GOOD, endless], [conditioning(), endless])
    entries, faults, _ = scan_folder(tmp_path, family)
    assert (len(entries), len(faults)) == (1, 2)
