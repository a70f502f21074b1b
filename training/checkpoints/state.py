"""Content of a checkpoint: the run as files, and the optimizer's state by parameter name."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapter_files.kohya_metadata import TOTAL_STEPS
from training.checkpoints.storage import (
    Checkpoint,
    CheckpointError,
    optimizer_to_bytes,
    tensors_from_bytes,
    tensors_to_bytes,
)

ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE = (
    "adapter.safetensors",
    "optimizer.pt",
    "trainer_state.json",
)
EMA_FILE, BEST_FILE = "ema.safetensors", "best.safetensors"
ALPHA_SUFFIX = ".alpha"
GROUP_KEY = "group"
SCHEDULED_KEYS = ("params", "lr", "lr_scale")
"""Values of a parameter group that follow from the config and the step."""

ParameterState = dict[str, Any]
NamedState = dict[str, ParameterState]
"""Parameter name -> optimizer state."""


@dataclass
class SavedState:
    """All of a run's state that is not a tensor. Everything else follows from the step
    (data/schedule.py)."""

    step: int
    steps: int
    """Planned steps of the run."""
    samples: int
    """Samples seen since the first step."""
    micro_batches_per_step: int
    grad_accumulation_steps: int
    """Value in the config. It may have been changed for another number of processes."""
    identity: dict[str, Any]
    """Facts that must not change, because the next step depends on them."""
    started_at: float
    tracker_id: str
    history: dict[str, Any]
    row: dict[str, float] = field(default_factory=dict)
    """Metrics of this step that were not reported yet."""
    best_step: int | None = None
    """Step of the weights in BEST_FILE."""


def to_files(
    state: SavedState,
    weights: dict[str, dict[str, Tensor]],
    alphas: dict[str, Tensor],
    optimizer: NamedState,
) -> dict[str, bytes]:
    """Return the files of a checkpoint. `weights`: file name -> tensors; empty ones are left out.

    Each weights file is an adapter file that `existing_lora` and the tools read: it has the alphas,
    and tensors that are not averaged are taken from ADAPTER_FILE."""
    common_tensors = {**alphas, **weights[ADAPTER_FILE]}
    previous_steps = state.identity["steps of the existing LoRA"]
    files = {}
    for name, tensors in weights.items():
        if tensors:
            step = state.best_step if name == BEST_FILE else state.step
            metadata = {TOTAL_STEPS: str(previous_steps + step)}
            files[name] = tensors_to_bytes({**common_tensors, **tensors}, metadata)
    files[OPTIMIZER_FILE] = optimizer_to_bytes(optimizer)
    files[STATE_FILE] = json.dumps(asdict(state)).encode()
    return files


def weights_of(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return the tensors of a weights file without the alphas; empty if there is no such file."""
    if name not in checkpoint.files:
        return {}
    tensors = tensors_from_bytes(checkpoint.files[name])
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ALPHA_SUFFIX)}


def state_of(checkpoint: Checkpoint) -> SavedState:
    """Return the state in a checkpoint. Raises CheckpointError if another version of the program
    wrote it."""
    try:
        return SavedState(**json.loads(checkpoint.files[STATE_FILE]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} was written by another version of this "
            f"program ({error}). Resume with that version, or use --overwrite to start again"
        ) from error


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]
) -> NamedState:
    """Return the optimizer's state by parameter name, so that it depends on no order and no
    process.

    Values of a parameter group that have changed are stored with each of its parameters, under
    GROUP_KEY."""
    name_of: dict[Tensor, str] = {parameter: name for name, parameter in names.items()}
    state: NamedState = {}
    for parameter, values in optimizer.state.items():
        name = name_of[parameter]
        state[name] = {key: to_cpu(value) for key, value in values.items()}
    for group in optimizer.param_groups:
        changed_values = changed_group_values(optimizer, group)
        if not changed_values:
            continue
        for parameter in group["params"]:
            parameter_state = state.setdefault(name_of[parameter], {})
            parameter_state[GROUP_KEY] = changed_values
    return state


def changed_group_values(optimizer: torch.optim.Optimizer, group: dict) -> dict[str, Any]:
    """Return the values of a parameter group that differ from the optimizer's defaults, on the
    CPU."""
    changed_values = {}
    for key, value in group.items():
        if key in SCHEDULED_KEYS:
            continue
        if key not in optimizer.defaults or optimizer.defaults[key] != value:
            changed_values[key] = to_cpu(value)
    return changed_values


def to_cpu(value: Any) -> Any:
    """Return a tensor on the CPU; other values are returned unchanged."""
    if isinstance(value, Tensor):
        return value.cpu()
    return value


def load_named_optimizer_state(
    optimizer: torch.optim.Optimizer, state: NamedState, names: dict[str, nn.Parameter]
) -> None:
    """Load the optimizer's state. Raises CheckpointError if it belongs to other parameters."""
    check_parameter_names(state, names)
    name_of = {parameter: name for name, parameter in names.items()}
    order: list[str] = []
    for group in optimizer.param_groups:
        order += [name_of[parameter] for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:
        first_name = order[group["params"][0]]
        group |= state.get(first_name, {}).get(GROUP_KEY, {})
    state_by_index = {}
    for index, name in enumerate(order):
        if name in state:
            values = dict(state[name])
            values.pop(GROUP_KEY, None)
            state_by_index[index] = values
    optimizer.load_state_dict({"state": state_by_index, "param_groups": groups})


def check_parameter_names(state: NamedState, names: dict[str, nn.Parameter]) -> None:
    """Raise CheckpointError unless the state is empty or has these parameters."""
    if not state or state.keys() == names.keys():
        return
    different_names = sorted(state.keys() ^ names.keys())
    first_names = ", ".join(different_names[:5])
    raise CheckpointError(
        f"the checkpoint's optimizer has {len(different_names)} other parameters: {first_names}"
    )
