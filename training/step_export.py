"""The callback that exports the adapter while a run trains."""

import glob

from common.atomic import WriteError
from common.precision import exact_products
from training.build import on_one_process
from training.components import RunComponents
from training.distributed.sharding import is_sharded
from training.export import ExportJob, average_name, export_facts, main_average, write_adapter
from training.memory.phase_memory import TRAINING
from training.reporting.status import EXPORTING
from training.run_folder import STEP_SUFFIX
from training.sampling.grid_weights import keep_weights
from training.sampling.samples import Weights
from training.services import RunServices
from training.train_state import TrainState


class ExportSteps:
    """Writes the adapter periodically, in files that have the step in their names."""

    def __init__(self, components: RunComponents, services: RunServices, state: TrainState):
        self.config, self.components = components.config, components
        self.services, self.state = services, state

    def before_first_step(self) -> None:
        """Export what an earlier process, which ended, did not.

        Collective, because the weights are."""
        name = glob.escape(self.config.export.name)
        pattern = f"{name}{self._suffix}.*"
        paths = self.services.folder.glob(pattern)
        is_missing = not any(paths)
        if self.services.main_wants(is_missing and self.state.step > 0):
            self.after_step()

    @property
    def _suffix(self) -> str:
        return STEP_SUFFIX.format(self.state.step)

    def after_step(self) -> None:
        step = self.state.step
        if step % self.config.export.every:
            return
        services = self.services
        status = services.record.status
        status.set_phase(EXPORTING)
        weights = services.ema.evaluation_state()
        if services.process.is_main:
            with self.components.adapted.using(weights):
                self._try_to_write(step, weights)
        services.barrier.wait()
        status.set_phase(TRAINING)

    def _try_to_write(self, step: int, weights: Weights) -> None:
        """Write the files. A full disk does not end the training."""
        try:
            if self.config.sample.grid:
                keep_weights(self.services.folder, step, weights, self.config.sample.grid)
            self._write(step)
        except WriteError as error:
            self.services.reporter.say(f"the adapter of step {step} is not exported: {error}")

    @exact_products()
    def _write(self, step: int) -> None:
        components, ema = self.components, self.config.ema
        if is_sharded(self.services.accelerator):
            components = on_one_process(components)
        weights_name = average_name(ema, main_average(ema))
        description = f"{weights_name}after step {step}"
        job = ExportJob({}, step, description, self._suffix)
        facts = export_facts(components, self.state, job)
        for path in write_adapter(components, facts):
            self.services.reporter.say(f"wrote {path}")
