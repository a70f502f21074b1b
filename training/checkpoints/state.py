"""What a checkpoint holds of a run, as files, and a run brought back from it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from training.checkpoints import storage
from training.checkpoints.storage import Checkpoint, CheckpointError
from training.metadata import TOTAL_STEPS

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.pt", "trainer_state.json"
EMA, BEST = "ema.safetensors", "best.safetensors"
ALPHA = ".alpha"
GROUP = "group"
SCHEDULED = ("params", "lr", "lr_scale")  # of a group, what the config and the step decide


@dataclass
class TrainerState:
    """All of a run that is not a tensor. Everything else follows from the step (data/schedule.py)."""

    step: int
    steps: int
    """That the run was to take."""
    samples: int
    """Seen since the first step."""
    micro_batches_per_step: int
    grad_accumulation_steps: int
    """As the config had it: what it became on another number of processes is not kept."""
    identity: dict[str, Any]
    """Facts that must be the same for the next step to be the one that would have come."""
    started_at: float
    tracker_id: str
    history: dict[str, Any]
    row: dict[str, float] = field(default_factory=dict)
    """Metrics of this step that were not reported yet."""
    best_step: int | None = None
    """Whose weights are kept in BEST."""


def to_files(
    state: TrainerState,
    weights: dict[str, dict[str, torch.Tensor]],
    alphas: dict[str, torch.Tensor],
    optimizer: dict[str, dict[str, Any]],
) -> dict[str, bytes]:
    """`weights`: by the name of their file; of what is empty there is none. Each file is an adapter that the tools and
    `existing_lora` read: with `alphas`, and with what is not averaged from ADAPTER."""
    common = {**alphas, **weights[ADAPTER]}
    previous = state.identity["steps of the existing LoRA"]
    steps = {name: state.best_step if name == BEST else state.step for name in weights}
    return {
        **{
            name: storage.tensors_to_bytes({**common, **tensors}, {TOTAL_STEPS: str(previous + steps[name])})
            for name, tensors in weights.items()
            if tensors
        },
        OPTIMIZER: storage.to_bytes(optimizer),
        STATE: json.dumps(asdict(state)).encode(),
    }


def weights_of(found: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """What `to_files` was given under `name`, and of an EMA what else it takes to be an adapter."""
    tensors = storage.tensors_from_bytes(found.files[name]) if name in found.files else {}
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ALPHA)}


def state_of(found: Checkpoint) -> TrainerState:
    try:
        return TrainerState(**json.loads(found.files[STATE]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint of step {found.step} was written by another version of this program ({error}). Go on with "
            "that version, or give --overwrite to start again"
        ) from error


def named_state(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """The optimizer's state by the names of its parameters: no order, no ranks in it. What it has of a whole group, and
    has changed, is with each of its parameters, under GROUP."""
    by_parameter: dict[torch.Tensor, str] = {parameter: name for name, parameter in names.items()}
    state = {by_parameter[p]: {k: on_cpu(v) for k, v in values.items()} for p, values in optimizer.state.items()}
    for group in optimizer.param_groups:
        changed = {k: on_cpu(v) for k, v in group.items() if k not in SCHEDULED and is_changed(optimizer, k, v)}
        for parameter in group["params"] if changed else ():
            state.setdefault(by_parameter[parameter], {})[GROUP] = changed
    return state


def on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def is_changed(optimizer: torch.optim.Optimizer, key: str, value: Any) -> bool:
    return key not in optimizer.defaults or optimizer.defaults[key] != value


def load_named_state(
    optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]], names: dict[str, nn.Parameter]
) -> None:
    """Raises CheckpointError if `state` is not of these parameters."""
    check_names(state, names)
    by_parameter = {parameter: name for name, parameter in names.items()}
    order = [by_parameter[p] for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:
        group |= state.get(order[group["params"][0]], {}).get(GROUP, {})
    per_parameter = {i: {k: v for k, v in state[n].items() if k != GROUP} for i, n in enumerate(order) if n in state}
    optimizer.load_state_dict({"state": per_parameter, "param_groups": groups})


def check_names(state: dict[str, dict[str, Any]], names: dict[str, nn.Parameter]) -> None:
    if state and state.keys() != names.keys():
        odd = sorted(state.keys() ^ names.keys())
        raise CheckpointError(
            f"the checkpoint's optimizer has other parameters: {', '.join(odd[:5])} ({len(odd)} in all)"
        )
