"""Components of a run that the trainer and several callbacks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from common.process import ProcessInfo
from training.config import TrainConfig
from training.distributed.accelerator import collective_timeout
from training.distributed.barrier import StoreBarrier
from training.distributed.consensus import Consensus
from training.distributed.engine import Engine
from training.distributed.failures import FailureWatch
from training.distributed.rank_check import RankCheck
from training.memory.phase_watch import PhaseWatch
from training.optim.ema import EmaWeights
from training.optim.registry import OPTIMIZERS
from training.reporting.reporter import Reporter
from training.reporting.trackers import new_tracker_id
from training.run_record import RunRecord
from training.stopping.requests import Requests
from training.stopping.signals import SignalHandler


@dataclass(frozen=True)
class RunServices:
    """Communication, reporting and evaluation weights of a run."""

    accelerator: Accelerator
    folder: Path
    reporter: Reporter
    ema: EmaWeights
    consensus: Consensus
    barrier: StoreBarrier
    rank_check: RankCheck
    memory: PhaseWatch
    requests: Requests
    record: RunRecord

    @classmethod
    def build(
        cls,
        config: TrainConfig,
        accelerator: Accelerator,
        engine: Engine,
        signals: SignalHandler,
        failures: FailureWatch,
        record: RunRecord,
    ) -> RunServices:
        """Build the components of a run. Collective."""
        folder = Path(config.output_dir)
        timeout = collective_timeout(config.distributed)
        consensus = Consensus(accelerator, timeout)
        is_main = accelerator.is_main_process
        memory = PhaseWatch(accelerator.device)
        memory.on_phase = record.status.set_phase
        is_schedule_free = OPTIMIZERS[config.optimizer].is_schedule_free
        return cls(
            accelerator=accelerator,
            folder=folder,
            reporter=Reporter(accelerator, folder, new_tracker_id(), record.say),
            ema=EmaWeights(config.ema, engine, is_schedule_free),
            consensus=consensus,
            barrier=StoreBarrier(accelerator, failures.heartbeat_keys, timeout.total_seconds()),
            rank_check=RankCheck(engine.denoiser, engine.names, consensus),
            memory=memory,
            requests=Requests(consensus, signals, folder, config.checkpoint.every_minutes, is_main),
            record=record,
        )

    def main_wants(self, is_wanted: bool) -> bool:
        """Return what the main process says. Collective.

        WHEN: a file in output_dir decides: perhaps only the main process's computer has it."""
        number = int(self.process.is_main and is_wanted)
        return bool(self.consensus.max_now(number))

    @property
    def process(self) -> ProcessInfo:
        return ProcessInfo.of(self.accelerator)
