"""PhaseWatch: the GPU memory that each phase of a run takes, and the planned one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from training.memory.config import GIB
from training.memory.phase_memory import PhaseName

START = "start"
"""Name of what comes before the first phase: encoding and loading."""


class PhaseWatch:
    """Measures the peak of each phase, and adds the plan to out-of-memory errors."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_phase: Callable[[str], object] | None = None
        """Called with the name of a phase that begins or continues."""
        self.planned: dict[str, int] = {}
        """Phase -> planned bytes on the GPU. Empty if the run was not planned."""
        self.current: str = START
        self.peaks: dict[str, int] = {}
        """Phase -> most bytes of tensors on the GPU so far."""

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """Measure a block as a phase. Phases may be inside of others."""
        self._record_peak()
        outer = self.current
        self._enter(name)
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.explain(error)
            raise
        finally:
            self._record_peak()
            self._enter(outer)

    def _enter(self, name: str) -> None:
        self.current = name
        if self.on_phase is not None and name != START:
            self.on_phase(name)

    def metrics(self) -> dict[str, float]:
        """Return memory in GiB: of this process on the host, and of its tensors on a GPU, now and
        at most so far, in the whole run and in each phase."""
        process = psutil.Process()
        host_memory = process.memory_info()
        num_bytes = {"memory/host": host_memory.rss}
        if self.device.type == "cuda":
            self._record_peak()
            num_bytes["memory/gpu_peak"] = max(self.peaks.values())
            num_bytes["memory/gpu"] = torch.cuda.memory_allocated(self.device)
            for phase, peak in self.peaks.items():
                name = phase.replace(" ", "_")
                num_bytes[f"memory/gpu_peak_{name}"] = peak
        metrics = {}
        for name, size in num_bytes.items():
            metrics[name] = size / GIB
        return metrics

    def _record_peak(self) -> None:
        """Note the peak since the last call for the current phase.

        The peak is that of PyTorch's own tensors."""
        if self.device.type != "cuda":
            return
        phase = self.current
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        earlier_peak = self.peaks.get(phase, 0)
        self.peaks[phase] = max(peak, earlier_peak)

    def explain(self, error: torch.OutOfMemoryError) -> None:
        """Add phase, planned and actual memory to an error, unless an inner phase did."""
        if getattr(error, "is_explained", False):
            return
        error.is_explained = True  # type: ignore[attr-defined]
        phase = f"phase `{self.current}`"
        facts = [f"The GPU's memory ran out in the {phase}"]
        planned = self.planned.get(self.current)
        if planned is not None:
            facts.append(f"planned {planned / GIB:.1f} GiB")
        if self.device.type == "cuda":
            facts.append(memory_in_use(self.device))
        text = "; ".join(facts)
        error.add_note(text)


def memory_in_use(device: torch.device) -> str:
    """Return who has the memory of a GPU."""
    free, size = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    used = size - free
    other_programs = used - reserved
    return (
        f"this process has {reserved / GIB:.1f} of {size / GIB:.1f} GiB, "
        f"and CUDA and other programs {other_programs / GIB:.1f} GiB"
    )
