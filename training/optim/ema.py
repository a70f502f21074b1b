"""EMA and schedule-free weights, which validation, samples and export use instead of the trained
weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from training.checkpoints.storage import CheckpointError
from training.config import EmaConfig
from training.distributed.engine import Engine


def decay_at(step: int, config: EmaConfig) -> float:
    """Return the decay after optimizer step number `step`, counted from 1. It rises to
    `config.decay`."""
    return min(config.decay, (1 + step) / (10 + step))


class EmaWeights:
    """The EMA of the trained weights in fp32 on their device, or the average of a schedule-free
    optimizer."""

    def __init__(self, config: EmaConfig, engine: Engine, is_schedule_free: bool):
        self.config, self.engine = config, engine
        self.ema: list[Tensor] = []
        if config.decay:
            self.ema = [weight.detach().clone() for weight in engine.trained]
        self.is_schedule_free = is_schedule_free
        if self.is_schedule_free:
            engine.optimizer.train()  # type: ignore[attr-defined]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA after optimizer step number `step`, counted from 1. Reads nothing from the
        device."""
        if self.ema:
            torch._foreach_lerp_(self.ema, self._weights(), 1 - decay_at(step, self.config))

    @contextmanager
    def applied(self, average: str | None = None) -> Iterator[None]:
        """Put the evaluation weights into the model for a block, then restore the trained weights
        bit for bit.

        `average`: ema or raw; None: ema.evaluate_with."""
        if average is None:
            average = self.config.evaluate_with
        uses_ema = self.ema and average == "ema"
        if not uses_ema and not self.is_schedule_free:
            yield
            return
        weights = self._weights()
        trained = [weight.clone() for weight in weights]
        try:
            if uses_ema:
                torch._foreach_copy_(weights, self.ema)
            else:
                self.engine.optimizer.eval()  # type: ignore[attr-defined]
            yield
        finally:
            if self.is_schedule_free:  # train() would restore the weights only up to rounding
                for group in self.engine.optimizer.param_groups:
                    group["train_mode"] = True
            torch._foreach_copy_(weights, trained)

    def evaluation_state(self, average: str | None = None) -> dict[str, Tensor]:
        """Return a copy of the adapters with their evaluation weights, on the CPU. `average`: as
        for `applied`."""
        with self.applied(average):
            return self.engine.adapted.state_dict()

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the EMA by parameter name, on the CPU; empty without an EMA."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._named_ema().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the EMA. Raises CheckpointError if `state` lacks parameters."""
        named_ema = self._named_ema()
        missing_names = sorted(named_ema.keys() - state.keys())
        if missing_names:
            first_names = ", ".join(missing_names[:5])
            raise CheckpointError(
                f"the checkpoint's EMA lacks {len(missing_names)} parameters: {first_names}"
            )
        for name, tensor in named_ema.items():
            tensor.copy_(state[name])

    def _named_ema(self) -> dict[str, Tensor]:
        return dict(zip(self.engine.names, self.ema, strict=False))

    def _weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.engine.trained]
