"""Encoding on several ranks, and by runs that are killed: the same rows, each encoded once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.project import BASE, PROJECT, TWEMOJI

from common.errors import DataError
from common.process import ProcessInfo
from data.precompute.build import FACTS_VERSION
from data.precompute.facts import FactsCache
from data.precompute.stages import Stages
from data.store.shard import data_path
from data.store.store import Store

WORKER = """
import json, sys, torch
from pathlib import Path
from accelerate import Accelerator
from common.errors import DataError
from common.process import ProcessInfo
from data.precompute.build import build_datasets
from helpers.data_cases import data_config
from models.detect import get_family
from models.config import ModelConfig

out, base, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
process = ProcessInfo.of(Accelerator(cpu=True))
assert process.count == int(sys.argv[4]), process.count
try:
    built = build_datasets(data_config(**options), get_family(ModelConfig(path=base)), process)
    result = {"content_hash": built.train.content_hash, "encoded": [built.encoded_images, built.encoded_captions],
              "first": built.train.latents(0).sum().item(), "rows": len(built.train)}
except DataError as error:
    result = {"error": str(error)}
(out / f"rank{process.index}.json").write_text(json.dumps(result))
"""


def launch(out: Path, ranks: int, **options) -> list[str]:
    out.mkdir(exist_ok=True)
    worker = out / "worker.py"
    worker.write_text(WORKER)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    return [*(launcher if ranks > 1 else [sys.executable]), str(worker), str(out), str(BASE), json.dumps(options),
            str(ranks)]  # fmt: skip


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}",
    "ACCELERATE_USE_CPU": "true",
}


def ran(out: Path, ranks: int, **options) -> list[dict]:
    subprocess.run(
        launch(out, ranks, **options), env=ENVIRONMENT, check=True, capture_output=True, timeout=300
    )
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def options_for(images: Path, cache: Path, **more) -> dict:
    return {
        "path": str(images),
        "cache_dir": str(cache),
        "resolution": 64,
        "encode_batch_size": 3,
        **more,
    }


def rows_in(cache: Path) -> dict[bytes, dict]:
    """Every row of every store of latents and of conditioning."""
    stores = [
        Store(folder) for pattern in ("media-*", "text-*") for folder in sorted(cache.glob(pattern))
    ]
    return {key: store[key] for store in stores for key in store.keys.tolist()}


def test_the_bytes_are_the_same_whatever_the_number_of_ranks(tmp_path):
    images = TWEMOJI / "train"
    one = ran(tmp_path / "one", 1, **options_for(images, tmp_path / "cache1", random_flip=True))
    three = ran(tmp_path / "three", 3, **options_for(images, tmp_path / "cache3", random_flip=True))
    assert three == one * 3
    a, b = rows_in(tmp_path / "cache1"), rows_in(tmp_path / "cache3")
    assert a.keys() == b.keys()
    assert len(a) == sum(one[0]["encoded"])
    assert all(tensor.equal(b[key][name]) for key, row in a.items() for name, tensor in row.items())
    assert not list((tmp_path / "cache3").glob(".stages-*"))


def test_faults_found_by_any_rank_end_them_all_with_the_same_message(tmp_path):
    images = tmp_path / "images"
    shutil.copytree(TWEMOJI / "train", images)
    names = sorted(path.name for path in images.glob("*.png"))[:3]
    for name in names:
        (images / name).write_bytes(b"damaged")
    results = ran(tmp_path / "out", 2, **options_for(images, tmp_path / "cache"))
    assert results[0] == results[1]
    assert all(name in results[0]["error"] for name in names)


def in_threads(folder: Path, ranks: int, work) -> list[object]:
    """Return what `work(stages)` returns or raises on each of `ranks` processes at once."""

    def run(rank: int) -> object:
        stages = Stages(ProcessInfo(rank, ranks, torch.device("cpu")), folder)
        try:
            return work(stages)
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def test_ranks_wait_for_each_other_by_files(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data.precompute.stages.broadcast_object_list", lambda token: token.__setitem__(0, "same")
    )

    def work(stages: Stages) -> tuple:
        first = stages.run_on_main(lambda: stages.process.index + 10)
        every = stages.run_on_all(lambda: stages.process.index**2)
        stages.close()
        return first, every

    assert in_threads(tmp_path, 3, work) == [(10, [0, 1, 4])] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("a bad file"), ["a bad file"] * 3),
        (OSError("disk"), ["process 1 failed: OSError: disk", "disk"] * 2),
    ],
)
def test_a_rank_that_fails_fails_all(tmp_path, monkeypatch, error, expected):
    monkeypatch.setattr(
        "data.precompute.stages.broadcast_object_list", lambda token: token.__setitem__(0, "same")
    )

    def work(stages: Stages) -> object:
        def fail() -> None:
            if stages.process.index == 1:
                raise error

        return stages.run_on_all(fail)

    results = in_threads(tmp_path, 3, work)
    assert all(isinstance(result, Exception) for result in results)
    assert [str(result) for result in results] == expected[:3]


def test_a_rank_does_not_wait_in_a_folder_that_was_removed(tmp_path, monkeypatch):
    """An orphan of a killed run would otherwise wait forever."""
    monkeypatch.setattr(
        "data.precompute.stages.broadcast_object_list", lambda token: token.__setitem__(0, "same")
    )

    def work(stages: Stages) -> object:
        stages.run_on_all(lambda: None)
        if stages.process.is_main:
            shutil.rmtree(stages.folder)
            return None
        return stages.run_on_main(lambda: None)

    _, error = in_threads(tmp_path, 2, work)
    assert "was removed, so process 0 is not running" in str(error)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_again_and_again_encodes_nothing_twice(tmp_path, ranks, monkeypatch):
    """SIGKILL at other moments of listing, checking and encoding; shards of two rows, so some are always complete."""
    images, cache = TWEMOJI / "train", tmp_path / "cache"
    expected = ran(tmp_path / "straight", 1, **options_for(images, tmp_path / "straight_cache"))[0]
    options = options_for(images, cache, encode_batch_size=1)
    command = launch(tmp_path / "out", ranks, **options)
    small = (tmp_path / "out" / "worker.py").read_text()
    (tmp_path / "out" / "worker.py").write_text(
        "import data.precompute.facts, data.store.store\n"
        f"data.store.store.ROWS_PER_SHARD = data.precompute.facts.FACTS_PER_FILE = 2\n{small}"
    )
    kept: dict[Path, int] = {}
    for delay in (2.0, 5.0, 6.0, 7.0):
        process = subprocess.Popen(
            command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
        shards = [shard for folder in cache.glob("*-*") for shard in folder.glob("shard-*")]
        files = [*(data_path(shard) for shard in shards), *facts_folder(cache).glob("*.arrow")]
        kept = {path: path.stat().st_mtime_ns for path in files}
    last = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    assert last.returncode == 0
    results = [
        json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in range(ranks)
    ]
    assert all(result["content_hash"] == expected["content_hash"] for result in results)
    straight, killed = rows_in(tmp_path / "straight_cache"), rows_in(cache)
    assert straight.keys() == killed.keys()
    stored = [key for folder in cache.glob("*-*") for key in Store(folder).keys.tolist()]
    assert len(stored) == len(set(stored)), "a row was written twice"
    facts = FactsCache(facts_folder(cache)).keys.tolist()
    assert len(facts) == len(set(facts)) == expected["rows"], "an image was checked twice"


def facts_folder(cache: Path) -> Path:
    return cache / f"facts-{FACTS_VERSION}"
