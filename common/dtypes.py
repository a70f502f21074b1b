"""Names of dtypes in options and messages."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of an option -> dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype for messages, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
