"""The callbacks that keep status.json and report.html up to date."""

from training.services import RunServices
from training.train_state import TrainState


class UpdateStatus:
    """Tells status.json about each step. Is called before the metrics of the step are written."""

    def __init__(self, state: TrainState, services: RunServices, previous_steps: int):
        """`previous_steps`: those of an existing adapter."""
        self.state = state
        self.reporter = services.reporter
        self.record = services.record
        self.previous_steps = previous_steps

    def before_first_step(self) -> None:
        step = self.state.step
        self.record.events.step = self.previous_steps + step
        self.record.status.set_first_step(step)

    def after_step(self) -> None:
        step = self.state.step
        row = self.reporter.row
        self.record.events.step = self.previous_steps + step
        self.record.status.set_step(
            step,
            speed=self.reporter.speed,
            loss=row.get("train/loss"),
            gpu_gib=row.get("memory/gpu_peak"),
        )


class WriteReport:
    """Writes report.html from time to time. Is called after the metrics of the step were written."""

    def __init__(self, services: RunServices):
        self.report = services.record.report
        self.say = services.record.say

    def before_first_step(self) -> None:
        self.after_step()

    def after_step(self) -> None:
        self.report.write_if_due()
        error_text = self.report.untold_error()
        if error_text:
            self.say(error_text)
