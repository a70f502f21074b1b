"""Grids of steps and strengths, from which one sees the best step."""

import time

import numpy as np
from accelerate.utils import broadcast_object_list

from common.atomic import write_file
from training.config import TrainConfig
from training.reporting.image_grid import grid_png
from training.run_folder import SAMPLES_FOLDER
from training.sampling.files import grid_path, padded_stills
from training.sampling.grid_weights import kept_paths, read_weights, remove_weights, steps_up_to
from training.sampling.prompts import SamplePrompt
from training.sampling.renderer import SampleRenderer
from training.sampling.samples import Samples, Weights, WeightSet
from training.services import RunServices

MAX_SIDE = 512
"""Longer side of an image in a grid, in pixels."""
NO_WEIGHTS = (
    "no weights of exported steps are kept. They are kept from the step on at which --sample.grid is set, "
    "and removed once the grids are drawn"
)


class SampleGrid:
    """Draws each prompt with the weights of the last exported steps, at several strengths."""

    def __init__(self, renderer: SampleRenderer, services: RunServices):
        self.renderer = renderer
        self.services = services
        self.config: TrainConfig = renderer.config

    def draw(self, last_step: int) -> bool:
        """Draw and write the grids; return whether a signal ended this, on all processes alike.

        Collective. An error costs the grids alone."""
        started_at = time.monotonic()
        images: dict[str, list[np.ndarray]] = {}
        prompts: list[SamplePrompt] = []
        steps = self._agreed_steps(last_step)
        for step in steps:
            weights = self._read_weights(step)
            if weights is None:
                return False
            samples = self.renderer.render(self._cells(step, weights), MAX_SIDE)
            if self.renderer.was_stopped:
                return True
            if samples is not None:
                images |= samples.images
                prompts = samples.prompts
        num_cells = len(steps) * len(self.config.sample.grid_strengths)
        is_complete = bool(images) and len(images) == num_cells
        if is_complete:  # else drawing has failed, or this is not the main process
            try:
                self._write(Samples(prompts, images), steps)
            except Exception as error:  # grids are worth less than the run
                self._leave_out(f"{type(error).__name__}: {error}")
                return False
            remove_weights(self.services.folder)
            seconds = time.monotonic() - started_at
            self.services.reporter.say(f"the grids took {seconds:.0f} s")
        return False

    def _agreed_steps(self, last_step: int) -> list[int]:
        """Return the last steps whose weights are kept, as the main process sees them. Collective.

        Prints the reason if the list is empty."""
        kept_steps = steps_up_to(last_step, kept_paths(self.services.folder))
        agreed = [kept_steps[-self.config.sample.grid :]]
        if self.services.process.count > 1:
            broadcast_object_list(agreed)
        (steps,) = agreed
        if not steps:
            self._leave_out(NO_WEIGHTS)
        return steps

    def _read_weights(self, step: int) -> Weights | None:
        """Return the weights of a step. Collective.

        Prints the reason and returns None on all processes if one of them cannot read the file."""
        error_text = ""
        weights: Weights = {}
        try:
            weights = read_weights(self.services.folder, step)
        except Exception as error:  # for example, this computer does not have the file
            error_text = f"{type(error).__name__}: {error}"
        has_error = int(bool(error_text))
        if self.services.consensus.max_now(has_error):
            self._leave_out(error_text or "another process could not read the weights")
            return None
        return weights

    def _leave_out(self, reason: str) -> None:
        """Print why nothing is drawn."""
        self.services.reporter.say(f"the grids of steps and strengths are left out: {reason}")

    def _cells(self, step: int, weights: Weights) -> dict[str, WeightSet]:
        """Return the weights and the strength of each cell of a row."""
        cells: dict[str, WeightSet] = {}
        for strength in self.config.sample.grid_strengths:
            label = cell_label(step, strength)
            cells[label] = WeightSet(weights, strength)
        return cells

    def _write(self, samples: Samples, steps: list[int]) -> None:
        """Write a grid for each prompt."""
        folder = self.services.folder / SAMPLES_FOLDER
        name = self.config.export.name
        reporter = self.services.reporter
        num_prompts = len(samples.prompts)
        for number in range(num_prompts):
            path = grid_path(folder, name, number)
            content = self._grid(samples, steps, number)
            write_file(path, content)
            reporter.say(f"wrote {path}")

    def _grid(self, samples: Samples, steps: list[int], number: int) -> bytes:
        """Return the grid of a prompt: a row for each step, a column for each strength."""
        captions = []
        for strength in self.config.sample.grid_strengths:
            captions.append(f"strength {strength:g}")
        rows: dict[str, np.ndarray] = {}
        for step in steps:
            label = f"step {step}"
            rows[label] = self._row(samples, step, number)
        return grid_png(rows, captions)

    def _row(self, samples: Samples, step: int, number: int) -> np.ndarray:
        """Return the images of a prompt at one step.

        OUT: (strengths, H, W, 3) in [0, 1]."""
        images = []
        for strength in self.config.sample.grid_strengths:
            label = cell_label(step, strength)
            images_of_cell = samples.images[label]
            images.append(images_of_cell[number])
        return padded_stills(images)


def cell_label(step: int, strength: float) -> str:
    """Return the label of a cell."""
    return f"step {step}, strength {strength:g}"
