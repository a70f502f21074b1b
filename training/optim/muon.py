"""Muon, which updates matrices, with AdamW for what is none."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon (K. Jordan, 2024) for matrices, torch's AdamW for all other parameters, at one learning rate.

    Muon makes the update of a matrix orthogonal. Kernels of convolutions, blocks of rotations and vectors are no
    matrices. Its updates are scaled to the size of AdamW's (arXiv 2502.16982), so that one rate fits both.
    """

    def __init__(
        self, params: Iterable, lr: float, weight_decay: float = 0.1, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ):  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(split(params), defaults)
        self.inner: list[torch.optim.Optimizer] = []
        for muon in (True, False):
            groups: list[dict[str, Any]] = [{**group} for group in self.param_groups if group["muon"] is muon]
            if groups and muon:
                for group in groups:
                    group["eps"] = 1e-7  # of Muon's division by a norm: another one than AdamW's
                self.inner.append(torch.optim.Muon(groups, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"))
            elif groups:
                self.inner.append(torch.optim.AdamW(groups, lr, betas, eps, weight_decay, fused=True))
        self._share()

    def _share(self) -> None:
        """One state and the same groups, whichever optimizer they are asked of."""
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        for optimizer in self.inner:
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for optimizer in self.inner:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss


def split(groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of matrices and groups of others, which `muon` tells apart; parameters alone are one group."""
    found = list(groups)
    if found and not isinstance(found[0], dict):
        found = [{"params": found}]
    return [
        {**group, "params": members, "muon": muon}
        for muon in (True, False)
        for group in found
        if (members := [p for p in group["params"] if is_matrix(p) is muon])
    ]


def is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) > 1
