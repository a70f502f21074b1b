"""The streaming writer: byte for byte as safetensors writes, in little memory."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.project import BASE, PROJECT
from helpers.tool_cases import base_file, of_case
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from adapter_files.safetensors_stream import (
    DTYPES,
    EMPTY_HASHES,
    TensorInfo,
    TensorStore,
    addnet_hashes,
    file_hashes,
    training_metadata,
    write_tensors,
)

MB = 1 << 20


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    return {
        **tensors,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        '\u00e9 "name"': torch.ones(5),
    }


@pytest.mark.parametrize("metadata", [{}, {"b": 'x\n"\u00e9' * 99}])
def test_the_writer_writes_as_safetensors(metadata, tmp_path):
    tensors = every_dtype()
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "a", infos, list(tensors.items())[::-1], metadata)
    assert (tmp_path / "a").read_bytes() == save(tensors, metadata or None)
    store = TensorStore([tmp_path / "a"])
    assert store.infos == infos
    for name, tensor in tensors.items():
        assert torch.equal(
            store.get(name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("size", [1, 300_000])
def test_the_hashes_are_those_of_the_whole_file(size, tmp_path):
    tensors = {"a": torch.randn(size), "b": torch.randn(size // 2 + 1).half()}
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    write_tensors(
        tmp_path / "a", infos, tensors.items(), {"ss_x": "1", "note": "2", **EMPTY_HASHES}
    )
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    hashed = addnet_hashes(save(tensors, training_metadata(metadata)))
    assert {name: metadata[name] for name in EMPTY_HASHES} == hashed
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "a").items())


class Counting(io.BytesIO):
    """A file that records the largest size of a read."""

    most = 0

    def read(self, size=-1):
        self.most = max(self.most, len(found := super().read(size)))
        return found


def test_hashing_takes_a_megabyte_at_a_time():
    content = save({"a": torch.arange(MB).float()})
    file, tensors_at = Counting(content), 8 + int.from_bytes(content[:8], "little")
    assert file_hashes(file, tensors_at, content[:tensors_at]) == addnet_hashes(content)
    assert 0 < file.most <= MB


PEAK = """
import sys, torch
sys.path.insert(0, {project!r})
import train_lora
from tools import inspect, merge
from adapter_files.safetensors_stream import TensorStore
from benchmarks.memory import peak_memory
small = train_lora.main(["merge", {small!r}, {out!r} + "1.safetensors", "--lora", {lora!r}, "--config", {base!r}])
before = peak_memory()
code = train_lora.main(["merge", {large!r}, {out!r} + "2.safetensors", "--lora", {lora!r}, "--config", {base!r}])
print("PEAK", peak_memory() - before, small, code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_merging_takes_the_memory_of_a_tensor(tmp_path):
    small, large = (
        base_file(tmp_path / "small.safetensors", torch.float16),
        tmp_path / "large.safetensors",
    )
    more = {f"first_stage_model.more.{i}": torch.full((MB // 4,), float(i)) for i in range(100)}
    save_file({**load_file(small), **more}, large)
    del more
    lora, _ = of_case(tmp_path, "LoRA")
    words = {
        "small": small,
        "large": large,
        "lora": lora,
        "base": BASE,
        "out": tmp_path / "out",
        "project": PROJECT,
    }
    code = PEAK.format(**{name: str(path) for name, path in words.items()})
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, *codes = map(int, done.stdout.split("PEAK")[1].split())
    assert codes == [0, 0]
    assert grown < 30 * MB  # of 100 MB more; what is read of a mapped file is let go every 16 MB
    assert torch.equal(
        load_file(tmp_path / "out2.safetensors")["first_stage_model.more.7"],
        torch.full((MB // 4,), 7.0),
    )
