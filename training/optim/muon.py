"""Muon for matrices and AdamW for all other parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

MUON_EPS = 1e-7
"""Added to the norm by which Muon divides; unrelated to AdamW's eps."""


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon (K. Jordan, 2024) for matrices, torch's AdamW for all other parameters, at one
    learning rate.

    Muon makes the update of a matrix orthogonal. Convolution kernels, blocks of rotations and
    vectors are not matrices. Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982),
    so that one learning rate fits both.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(split_by_shape(params), defaults)
        muon_groups: list[dict[str, Any]] = [
            {**group, "eps": MUON_EPS} for group in self.param_groups if group["is_muon"]
        ]
        adam_groups: list[dict[str, Any]] = [
            {**group} for group in self.param_groups if not group["is_muon"]
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon_groups:
            self.optimizers.append(
                torch.optim.Muon(
                    muon_groups, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"
                )
            )
        if adam_groups:
            self.optimizers.append(
                torch.optim.AdamW(adam_groups, lr, betas, eps, weight_decay, fused=True)
            )
        self._share_state()

    def _share_state(self) -> None:
        """Let both optimizers use the groups and the state of this one."""
        self.param_groups = [
            group for optimizer in self.optimizers for group in optimizer.param_groups
        ]
        for optimizer in self.optimizers:
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def split_by_shape(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Split each group into matrices and other parameters, marked by `is_muon`. Bare parameters are
    one group."""
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    result = []
    for is_muon in (True, False):
        for group in groups:
            members = [
                parameter for parameter in group["params"] if is_matrix(parameter) is is_muon
            ]
            if members:
                result.append({**group, "params": members, "is_muon": is_muon})
    return result


def is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) > 1
