"""The weights that a run shows, where they are not the ones it trains: their EMA, or a schedule-free optimizer's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from training.checkpoints.storage import CheckpointError
from training.config import EmaConfig, TrainConfig
from training.distributed.engine import Engine
from training.optim.registry import OPTIMIZERS


def decay_at(step: int, config: EmaConfig) -> float:
    """The decay after optimizer step number `step` (from 1): a pure function, that rises to the one asked for."""
    return min(config.decay, (1 + step) / (10 + step))


class Averages:
    """An EMA in fp32 on the device of the weights, none with a decay of 0; and a schedule-free optimizer's average."""

    def __init__(self, config: TrainConfig, engine: Engine):
        self.config, self.engine = config.ema, engine
        self.ema = [weight.detach().clone() for weight in engine.trained] if config.ema.decay else []
        self.schedule_free = OPTIMIZERS[config.optimizer_name].averages
        if self.schedule_free:
            engine.optimizer.train()  # type: ignore[attr-defined]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, from 1. Reads no device."""
        if self.ema:
            torch._foreach_lerp_(self.ema, self._weights(), 1 - decay_at(step, self.config))

    @contextmanager
    def shown(self, which: str | None = None) -> Iterator[None]:
        """The model has the weights to show in this block, and those it trains again afterwards, bit for bit.

        `which`: ema or raw; None: as the config says.
        """
        average = self.ema and (which or self.config.use) == "ema"
        if not average and not self.schedule_free:
            yield
            return
        weights = self._weights()
        trained = [weight.clone() for weight in weights]
        try:
            if average:
                torch._foreach_copy_(weights, self.ema)
            else:
                self.engine.optimizer.eval()  # type: ignore[attr-defined]
            yield
        finally:
            if self.schedule_free:  # its own train() goes back to rounding only
                for group in self.engine.optimizer.param_groups:
                    group["train_mode"] = True
            torch._foreach_copy_(weights, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the EMA by parameter name, on the CPU; empty without one."""
        return {name: t.to("cpu", copy=True) for name, t in zip(self.engine.names, self.ema, strict=False)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises CheckpointError if `state` does not have these parameters."""
        here = dict(zip(self.engine.names, self.ema, strict=False))
        if odd := sorted(here.keys() - state.keys()):
            raise CheckpointError(f"the checkpoint's EMA lacks parameters: {', '.join(odd[:5])} ({len(odd)})")
        for name, tensor in here.items():
            tensor.copy_(state[name])

    def _weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.engine.trained]
