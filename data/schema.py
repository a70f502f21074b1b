"""What a row on disk looks like: its key, and each tensor as raw bytes with dtype and shape.

Raw bytes because Arrow has no bfloat16 and decodes nested lists number by number; any torch dtype comes back exactly.
Latents and conditioning are stored as the encoders give them: fp32, raw (not normalised).
"""

import torch
from datasets import Features, List, Value
from torch import Tensor


def features(names: list[str]) -> Features:
    """Columns of a store whose rows hold the tensors `names`."""
    columns = {"key": Value("string")}
    for name in names:
        columns |= {
            f"{name}.data": Value("binary"),
            f"{name}.dtype": Value("string"),
            f"{name}.shape": List(Value("int32")),
        }
    return Features(columns)


def to_row(key: str, tensors: dict[str, Tensor]) -> dict:
    row: dict = {"key": key}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        row[f"{name}.data"] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        row[f"{name}.dtype"] = str(tensor.dtype).removeprefix("torch.")
        row[f"{name}.shape"] = list(tensor.shape)
    return row


def from_row(row: dict) -> dict[str, Tensor]:
    result = {}
    for column in row:
        if column.endswith(".data"):
            name = column.removesuffix(".data")
            dtype = getattr(torch, row[f"{name}.dtype"])
            data = bytearray(row[column])  # torch wants memory it may write to, and refuses none at all
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            result[name] = flat.reshape(row[f"{name}.shape"])
    return result
