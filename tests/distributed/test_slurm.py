"""The batch scripts on a real SLURM: what they train, and that a job ends as if nothing had happened to it."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.project import BASE, PROJECT, TWEMOJI
from helpers.slurm_cluster import SlurmCluster, until, why_not
from safetensors.torch import load_file

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=f"no SLURM: {WHY_NOT}")]
SCRIPTS = PROJECT / "accelerate_configs" / "slurm"
STEPS = 120
ONE_NODE = ["--gpus-per-node=2", "--cpus-per-task=2", str(SCRIPTS / "one_node.sbatch")]
TWO_NODES = [
    "--nodes=2",
    "--gpus-per-node=1",
    "--cpus-per-task=1",
    str(SCRIPTS / "multi_node.sbatch"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def settings(cache_dir: Path) -> list[str]:
    """A run of two processes that takes six seconds once it trains, and that writes no previews."""
    return [
        f"--model.path={BASE}", f"--data.path={TWEMOJI / 'train'}", f"--data.cache_dir={cache_dir}",
        "--data.resolution=64", f"--steps={STEPS}", "--rank=4", "--training_dtype=fp32", "--lora_dtype=fp32",
        "--no_gradient_checkpointing", "--no_preview", "--adapter.targets=attention",
    ]  # fmt: skip


def submit(cluster: SlurmCluster, folder: Path, *words: str, **more: str) -> "Job":
    """Hands in a batch script, with options of sbatch before and options of train_lora.py behind it."""
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "VENV": sys.prefix,
        "TQDM_MININTERVAL": "0",
        "OUTPUT": str(folder),
    }
    environment |= more
    job = cluster.submit(f"--output={folder}/%a.log", *words, cwd=PROJECT, **environment)
    return Job(cluster, job, folder, folder / "4294967294.log")  # the %a of what is not an array


@dataclass
class Job:
    """A batch job that trains into `folder`."""

    cluster: SlurmCluster
    id: str
    folder: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8") if self.log_file.exists() else ""

    def check(self, condition: bool) -> None:
        assert condition, f"{self.cluster.job(self.id)}\n{self.log[-6000:]}"

    def step(self) -> int:
        """The last step on the progress bar."""
        return max(map(int, re.findall(r"\| (\d+)/\d+ \[", self.log)), default=0)

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max(
            (int(path.name[5:]) for path in self.folder.glob("checkpoints/step_*")), default=0
        )

    def resumed(self) -> int:
        """How often the job went on from a checkpoint."""
        return len(re.findall(r"^0: .*resumed at step", self.log, re.M))

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        until(lambda: condition() or self.cluster.ended(self.id), seconds, what)
        self.check(condition())

    def goes_on(self, restarts: int) -> None:
        """Waits until the job is requeued, and lets it go on."""
        self.wait(lambda: self.cluster.requeued(self.id, restarts), f"job {self.id} is requeued")
        self.cluster.start_now(self.id)

    def adapter(self) -> dict[str, torch.Tensor]:
        """What the job has trained, when it has ended well."""
        until(lambda: self.cluster.ended(self.id), 240, f"job {self.id} ends")
        self.check(self.cluster.job(self.id)["JobState"] == "COMPLETED")
        return load_file(self.folder / "lora.safetensors")


@pytest.fixture(scope="module")
def straight(
    cluster: SlurmCluster, settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    """The adapter of a job on one node to which nothing happens."""
    folder = tmp_path_factory.mktemp("straight")
    return submit(cluster, folder, *ONE_NODE, *settings, f"--output_dir={folder}").adapter()


def assert_equal(
    adapter: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert adapter.keys() == expected.keys()
    for name, tensor in adapter.items():
        difference = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert difference <= tolerance, name


def test_two_nodes_train_the_adapter_of_one(cluster, settings, straight, tmp_path):
    job = submit(cluster, tmp_path, *TWO_NODES, *settings, f"--output_dir={tmp_path}")
    assert_equal(job.adapter(), straight, tolerance=1e-5)
    assert {path.name for path in (tmp_path / "logs" / f"{job.id}.0").iterdir()} == {
        "n1",
        "n2",
        "started",
    }
    assert "n1 n2, 1 processes each" in job.log


def test_a_job_goes_on_after_a_warning_a_requeue_and_a_killed_rank(
    cluster, settings, straight, tmp_path
):
    job = submit(
        cluster, tmp_path, *ONE_NODE, *settings, f"--output_dir={tmp_path}", "--checkpoint.every=60"
    )
    for restarts, words in enumerate((["scancel", "--signal=USR1"], ["scontrol", "requeue"]), 1):
        before = job.saved()
        job.wait(lambda: job.step() >= before + 10, "the job trains")  # noqa: B023
        seen = job.step()
        cluster.run(*words, job.id)
        job.goes_on(restarts)
        assert seen <= job.saved() < 60, (
            f"{' '.join(words)} saves at once, not when the next checkpoint is due"
        )
    job.wait(lambda: job.saved() >= 60, "a checkpoint is written")
    cluster.ranks()[1].kill()
    job.goes_on(3)
    assert_equal(job.adapter(), straight)
    assert job.resumed() == 3
    assert "failed after a new checkpoint: requeued" in job.log


@pytest.mark.long
def test_a_job_goes_on_after_a_killed_rank_and_a_dead_node(cluster, settings, straight, tmp_path):
    restarts = "--max_restarts 1 --rdzv_backend c10d"  # within the job, by its launchers
    options = [*TWO_NODES, *settings, f"--output_dir={tmp_path}", "--checkpoint.every=20"]
    job = submit(cluster, tmp_path, *options, ACCELERATE_OPTIONS=restarts)
    job.wait(lambda: job.saved() >= 20, "a checkpoint is written")
    cluster.ranks()[1].kill()
    job.wait(
        lambda: job.resumed() == 1 and job.saved() >= 60,
        "the launchers have started the ranks again",
    )
    assert cluster.job(job.id)["Restarts"] == "0"
    cluster.machines["n1"].crash()  # the node of the batch script and of rank 0
    job.wait(lambda: cluster.requeued(job.id, 1), "SLURM notices")
    cluster.start_node("n1")
    job.goes_on(1)
    assert_equal(job.adapter(), straight)
    assert job.resumed() == 2


def test_a_warning_before_the_first_step_requeues(cluster, settings, tmp_path):
    job = submit(cluster, tmp_path, *ONE_NODE, *settings, f"--output_dir={tmp_path}")
    job.wait(
        lambda: [handles_usr1(rank.pid) for rank in cluster.ranks()] == [True, True],
        "the ranks are starting",
    )
    cluster.run("scancel", "--signal=USR1", job.id)
    job.wait(lambda: cluster.requeued(job.id, 1), "the job is requeued")
    assert job.step() == 0
    cluster.run("scancel", job.id)


def handles_usr1(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    [caught] = re.findall(r"^SigCgt:\s*(\w+)", status, re.M)
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.long
def test_a_warning_of_the_time_limit_saves_and_requeues(cluster, settings, tmp_path):
    """SLURM's shortest limit is a minute; the warning comes 20 to 50 seconds after the start, wherever the run is."""
    options = ["--time=1", "--signal=USR1@10", *ONE_NODE, *settings, f"--output_dir={tmp_path}"]
    job = submit(cluster, tmp_path, *options, "--steps=5000", "--checkpoint.every=5000")
    job.wait(lambda: cluster.requeued(job.id, 1), "the job is requeued")
    assert job.saved() >= job.step()
    cluster.run("scancel", job.id)


@pytest.mark.long
def test_tasks_of_an_array_train_a_recipe_each_and_fail_alone(cluster, settings, tmp_path):
    recipes = [tmp_path / f"{name}.yaml" for name in ("cats", "dogs")]
    for rank, recipe in enumerate(recipes, 4):
        recipe.write_text(f"rank: {rank}\noutput_dir: output/not_here\n", encoding="utf-8")
    options = [option for option in settings if "--rank" not in option]
    words = [
        "--array=0-1",
        "--gpus-per-node=1",
        "--cpus-per-task=2",
        str(SCRIPTS / "array.sbatch"),
        *map(str, recipes),
    ]
    array = submit(cluster, tmp_path, *words, "--", *options, "--checkpoint.every=20")
    tasks = [replace(array, id=f"{array.id}_{i}", folder=tmp_path / recipe.stem, log_file=tmp_path / f"{i}.log")
             for i, recipe in enumerate(recipes)]  # fmt: skip
    tasks[0].wait(lambda: tasks[0].saved() >= 20 and tasks[1].saved() > 0, "both are training")
    # the id of one task is that of the array too: what is done to it must not be done to the others
    same = next(task for task in tasks if cluster.job(task.id)["JobId"] == array.id)
    other = next(task for task in tasks if task is not same)
    [rank] = [
        rank
        for rank in cluster.ranks()
        if f"--output_dir {same.folder}" in " ".join(rank.cmdline())
    ]
    rank.kill()
    same.goes_on(1)
    same.wait(lambda: same.resumed() == 1 and same.step() < STEPS, "it has gone on")
    cluster.run("scancel", "--signal=USR1", same.id)
    same.goes_on(2)
    assert cluster.job(other.id)["Restarts"] == "0"
    ranks = [
        {t.shape[0] for name, t in task.adapter().items() if "lora_down" in name} for task in tasks
    ]
    assert ranks == [{4}, {5}]
    assert (same.resumed(), other.resumed()) == (2, 0)


def test_a_mistake_is_not_requeued(cluster, settings, tmp_path):
    (tmp_path / "empty").mkdir()
    for mistake, exit_code, message in (
        ("--stepz=3", "2:0", "Unrecognized options"),
        (
            f"--data.path={tmp_path / 'empty'}",
            "1:0",
            "failed without a new checkpoint: not requeued",
        ),
    ):
        job = submit(
            cluster, tmp_path, *ONE_NODE, *settings, f"--output_dir={tmp_path / 'out'}", mistake
        )
        until(lambda: cluster.ended(job.id), 240, "the job ends")  # noqa: B023
        known = cluster.job(job.id)
        assert (known["JobState"], known["ExitCode"], known["Restarts"]) == (
            "FAILED",
            exit_code,
            "0",
        ), job.log
        assert message in job.log
