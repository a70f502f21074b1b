"""The callback that draws samples while a run trains."""

import time

from common.atomic import WriteError
from common.errors import counted
from models.base import ModelFamily
from training.config import TrainConfig
from training.reporting.trackers import log_images
from training.sampling.files import padded_stills, sheet_path, write_samples
from training.sampling.renderer import SampleRenderer, Samples, SamplingError
from training.services import RunServices
from training.train_state import TrainState


class DrawSamples:
    """Draws samples periodically with the weights that would be exported.

    WHEN: after the step is saved, so that a process that ends while it draws has lost nothing."""

    def __init__(
        self,
        renderer: SampleRenderer,
        family: ModelFamily,
        state: TrainState,
        services: RunServices,
    ):
        self.renderer, self.family = renderer, family
        self.state, self.services = state, services
        self.config: TrainConfig = renderer.config

    def before_first_step(self) -> None:
        """Draw what an earlier process did not: samples before training, or those of the step from
        which the run is resumed."""
        is_due = self.config.sample.at_start if self.state.step == 0 else self._is_due()
        path = sheet_path(self.services.folder, self.config.export.name, self.state.step)
        is_missing = not path.exists()
        is_wanted = int(is_due and is_missing)
        if self.services.consensus.max_now(is_wanted):
            self._draw()

    def after_step(self) -> None:
        if self._is_due():
            self._draw()

    def _is_due(self) -> bool:
        return self.state.step % self.config.sample.every == 0

    def _draw(self) -> None:
        """Draw and write the samples of this step. Collective."""
        started_at = time.monotonic()
        weights = self.services.ema.evaluation_state()
        try:
            samples = self.renderer.render({"now": weights})
        except SamplingError as error:
            raise RuntimeError(
                f"{error}\nA sharded model cannot train on after that. The checkpoint of the last "
                "saved step is complete: resume with --sample.every 0"
            ) from error
        if samples is not None:
            self._write(samples, time.monotonic() - started_at)

    def _write(self, samples: Samples, seconds: float) -> None:
        services, step = self.services, self.state.step
        name, fps = self.config.export.name, self.family.limits.fps
        try:
            path = write_samples(samples, services.folder, name, step, fps)
        except (OSError, WriteError) as error:  # a full disk must not end the training
            services.reporter.say(f"samples of step {step} could not be written: {error}")
            return
        (images,) = samples.images.values()
        log_images(services.accelerator, {"samples": padded_stills(images)}, step)
        count = counted(len(samples.prompts), "sample")
        services.reporter.say(f"step {step}: {count} in {seconds:.1f} s, {path}")
