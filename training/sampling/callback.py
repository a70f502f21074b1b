"""The callback that draws samples while a run trains."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import counted
from training.checkpoints.best import stops_early
from training.components import RunComponents
from training.config import TrainConfig
from training.memory.phase_memory import SAMPLES, TRAINING
from training.reporting.trackers import log_images
from training.run_folder import SAMPLES_FOLDER
from training.sampling.clip_score import ClipScore
from training.sampling.files import (
    is_of_prompt,
    padded_stills,
    read_still,
    sheet_path,
    write_samples,
)
from training.sampling.measures import measure_samples
from training.sampling.overview import files_by_step, write_overview
from training.sampling.prompts import SamplePrompt
from training.sampling.renderer import SampleRenderer, SamplingError
from training.sampling.samples import Samples, WeightSet
from training.services import RunServices
from training.train_state import TrainState
from training.workflow.run_workflow import step_workflows


class DrawSamples:
    """Draws samples periodically with the weights that would be exported.

    The step is saved before, so that a process that ends while it draws has lost nothing."""

    def __init__(
        self,
        renderer: SampleRenderer,
        components: RunComponents,
        state: TrainState,
        services: RunServices,
        save_step: Callable[[], None],
    ):
        """`save_step`: saves a checkpoint of this step, unless it has one."""
        self.renderer, self.components, self.save_step = renderer, components, save_step
        self.state, self.services = state, services
        self.config: TrainConfig = renderer.config
        self.data_images = services.record.data.images
        self.score_model = self.config.sample.score_model
        self.clip_score: ClipScore | None = None

    def before_first_step(self) -> None:
        """Draw what an earlier process did not: samples before training, or those of the step from
        which the run is resumed."""
        step = self.state.step
        is_due = self._is_due()
        if step == 0:
            is_due = self.config.sample.at_start
        name = self.config.export.name
        path = sheet_path(self.services.folder, name, step)
        if self.services.main_wants(is_due and not path.exists()):
            self._draw()

    def after_step(self) -> None:
        if not self._is_due():
            return
        if self.config.checkpoint.every:  # else only the last step is saved
            self.save_step()
        self._draw()

    def _is_due(self) -> bool:
        step = self.state.step
        history = self.state.history
        validation = history.validation
        is_last = step == self.config.steps
        if stops_early(validation, self.config.validation):
            is_last = True
        return is_last or step % self.config.sample.every == 0

    def _draw(self) -> None:
        """Draw and write the samples of this step. Collective."""
        started_at = time.monotonic()
        weights = self.services.ema.evaluation_state()
        try:
            samples = self.renderer.render({"now": WeightSet(weights)})
        except SamplingError as error:
            raise RuntimeError(
                f"{error}\nA sharded model cannot train on after that. The checkpoint of the last "
                "saved step is complete: resume with --sample.every 0"
            ) from error
        seconds = time.monotonic() - started_at
        status = self.services.record.status
        if samples is not None:
            status.set_phase(SAMPLES)
            self._write(samples, seconds)
            status.set_phase(TRAINING)
        self.services.reporter.leave_out(time.monotonic() - started_at)

    def _write(self, samples: Samples, seconds: float) -> None:
        services, step = self.services, self.state.step
        name, fps = self.config.export.name, self.components.family.limits.fps
        try:
            workflows = self._workflows(len(samples.prompts))
            path = write_samples(samples, services.folder, name, step, fps, workflows)
            path = write_overview(path.parent, name, samples.prompts) or path
        except Exception as error:  # a full disk must not end the training
            reason = f"{type(error).__name__}: {error}"
            services.reporter.say(f"samples of step {step} could not be written: {reason}")
            return
        self._measure(samples)
        self._track(samples)
        count = counted(len(samples.prompts), "sample")
        duration = f"{seconds:.1f} s"
        services.reporter.say(f"step {step}: {count} in {duration}, {path}")

    def _workflows(self, num_samples: int) -> list[str]:
        """Return the workflows of this step's samples, for their metadata; empty texts after an error."""
        try:
            return step_workflows(self.components, self.state.step)
        except Exception as error:  # metadata are worth less than the samples
            reason = f"{type(error).__name__}: {error}"
            self.services.reporter.say(f"note: samples have no workflow for ComfyUI: {reason}")
            return [""] * num_samples

    def _measure(self, samples: Samples) -> None:
        """Add rough numbers about the samples to the metrics of the step."""
        (images,) = samples.images.values()
        stills = [frames[-1] for frames in images]
        reporter = self.services.reporter
        try:
            base_stills = self._base_stills(samples.prompts)
            metrics = measure_samples(stills, base_stills, self.data_images)
        except Exception as error:  # numbers are worth less than the training
            reason = f"{type(error).__name__}: {error}"
            reporter.say(f"note: the samples were not measured: {reason}")
            return
        reporter.row |= metrics | self._clip_metrics(stills, samples.prompts)

    def _clip_metrics(
        self, stills: list[np.ndarray], prompts: list[SamplePrompt]
    ) -> dict[str, float]:
        """Return the score of the CLIP model, if there is one. After an error, it is not used again."""
        folder = self.score_model
        if folder is None:
            return {}
        texts = [prompt.text for prompt in prompts]
        try:
            if self.clip_score is None:
                self.clip_score = ClipScore(Path(folder))
            score = self.clip_score.score(stills, texts)
        except Exception as error:  # a score is worth less than the training
            self.score_model = None
            reason = f"{type(error).__name__}: {error}"
            self.services.reporter.say(f"note: --sample.score_model {folder}: {reason}")
            return {}
        return {"samples/clip_score": score}

    def _base_stills(self, prompts: list[SamplePrompt]) -> list[np.ndarray]:
        """Return the samples of step 0 if these have the same prompts; else none."""
        folder = self.services.folder / SAMPLES_FOLDER
        name = self.config.export.name
        all_files = files_by_step(folder, name)
        files = all_files.get(0, {})
        stills = []
        for number, prompt in enumerate(prompts):
            path = files.get(number)
            if path is None or not is_of_prompt(path, prompt.text):
                return []
            stills.append(read_still(path))
        return stills

    def _track(self, samples: Samples) -> None:
        """Send the samples to the trackers, at the step of the metrics."""
        total_steps = self.components.previous_steps + self.state.step
        (images,) = samples.images.values()
        stills = padded_stills(images)
        tracked_images = {"samples": stills}
        log_images(self.services.accelerator, tracked_images, total_steps)
