"""What a second rank brings, and where the seconds of a step go: `python benchmarks/scaling.py`.

Runs of train_lora.py take turns, each rank a process with one thread: one rank alone; two runs of
one rank each, side by side, which share the machine but nothing else; one run of two ranks over
gloo. Samples per second of two ranks over those of one is what the bar is on, in the half of the
rounds in which other processes did least; over those of two runs side by side it is what
distribution itself costs, without the memory that any two processes share. Then how long a
checkpoint takes, and how long after a SIGTERM the demo's is on the disk. A line per bar; exits with
1 if one is missed. `--tiny`: whether it all runs, on a tiny model; throughput does not count then.
`--paper` prints the tables of docs/scaling.md instead (benchmarks/on_paper.py).
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ["HF_HUB_OFFLINE"] = "1"

EMOJI = PROJECT / "examples" / "emoji"
THROUGHPUT_BAR = 1.9  # times one rank's samples per second
ALONE, APART, TOGETHER = "1 rank", "2 runs of 1 rank", "1 run of 2 ranks"
PARTS = ("step", "data", "forward+backward", "waiting", "reduction", "optimizer", "rest", "cpu")
WIDTH = {part: max(len(part) + 2, 9) for part in PARTS}
WARM_UP = 3
SIZES = {"Float": 4, "Long": 8}
OPTIONS = [
    f"--data.path={EMOJI / 'twemoji' / 'train'}",
    "--data.resolution=64",
    "--rank=16",
    "--adapter.targets=attention",
    "--steps=100000",
    "--tracking.log_every=100000",
    "--checkpoint.every=0",
    "--checkpoint.every_minutes=0",
    "--distributed.rank_check_every=0",
    "--no_preview",
    "--no_gradient_checkpointing",
]


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    name: str
    batch_size: int
    dtype: str
    unet: str = ""
    """The name of a config in benchmarks/unet.py, for which a model is made; none: the embedded
    model."""


CASES = (
    Case("UNet of SD 1.5's size, bf16, batch 1", 1, "bf16", "CONFIG"),
    Case("embedded UNet, fp32, batch 8", 8, "fp32"),
)
TINY = (Case("tiny UNet, bf16, batch 1", 1, "bf16", "TINY"),)


def make_model(folder: Path, config_name: str) -> Path:
    """The embedded model with another UNet, of random weights. Its texts are narrower than CLIP's, as the text encoder
    is; nothing else differs from the config."""
    import torch

    from benchmarks import unet

    width = json.loads(
        (EMOJI / "base" / "text_encoder" / "config.json").read_text(encoding="utf-8")
    )["hidden_size"]
    shutil.copytree(EMOJI / "base", folder, ignore=shutil.ignore_patterns("unet"))
    model = unet.base_unet({**getattr(unet, config_name), "cross_attention_dim": width})
    torch.nn.Module.to(model, torch.bfloat16)  # diffusers' own warns of layers that are not there
    model.save_pretrained(folder / "unet")  # type: ignore[operator]
    return folder


class Rank:
    """A process of benchmarks/scaling_rank.py."""

    def __init__(
        self, folder: Path, options: Iterable[str], group: tuple[int, int, int] | None = None
    ):
        """`group`: rank, ranks, port."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TQDM_DISABLE": "1",
        }
        if group is not None:
            rank, ranks, port = map(str, group)
            environment |= {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_PORT": port,
                "MASTER_ADDR": "127.0.0.1",
                "TORCH_FR_BUFFER_SIZE": "2000",
            }
        self.log = folder / f"log_{group[0] if group else 0}.txt"
        argv = [
            sys.executable,
            "-m",
            "benchmarks.scaling_rank",
            *OPTIONS,
            *options,
            f"--output_dir={folder / 'out'}",
            f"--data.cache_dir={folder / 'cache'}",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv, env=environment, cwd=PROJECT, text=True, stdin=-1, stdout=-1, stderr=log
            )

    def ask(self, what: int | str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank ended: {self.log.read_text(encoding='utf-8')[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # the run ends with its orders
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def ask(ranks: list[Rank], what: int | str) -> list[dict]:
    for rank in ranks:
        rank.ask(what)
    return [rank.answer() for rank in ranks]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def busy() -> float:
    """Seconds that all cores together have worked since the start of the machine."""
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    idle, waiting = int(words[3]), int(words[4])
    return (sum(map(int, words[:8])) - idle - waiting) / os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    """What a case took, in the order of its rounds."""

    steps: dict[str, list[dict]]
    """Of each way the steps of its first rank."""
    rates: dict[str, list[float]]
    """Of each way the samples per second of each round."""
    collectives: list[list]
    adapter_bytes: int
    writes: list[dict]
    others: list[float]
    """Cores that processes of others kept busy in each round."""

    def quiet(self) -> list[int]:
        """The half of the rounds in which others did least: two ranks need both cores of this
        machine."""
        return sorted(range(len(self.others)), key=self.others.__getitem__)[
            : (len(self.others) + 1) // 2
        ]

    def ratio(self, over: str, rounds: Iterable[int]) -> float:
        return median(self.rates[TOGETHER][i] / self.rates[over][i] for i in rounds)


def measure(case: Case, folder: Path, rounds: int, count: int) -> Measured:
    """Rounds in which each way takes `count` steps."""
    model = make_model(folder / "model", case.unet) if case.unet else EMOJI / "base"
    options = [
        f"--model.path={model}",
        f"--batch_size={case.batch_size}",
        f"--training_dtype={case.dtype}",
    ]
    single = [Rank(folder / f"single_{i}", options) for i in range(2)]
    port = free_port()
    pair = [Rank(folder / "pair", options, (i, 2, port)) for i in range(2)]
    ways = {ALONE: single[:1], APART: single, TOGETHER: pair}
    found = Measured({way: [] for way in ways}, {way: [] for way in ways}, [], 0, [], [])
    try:
        for ranks in (single, pair):
            ask(ranks, WARM_UP)
            ask(ranks, "save")  # by then the base is hashed
        names = list(ways)
        for turn in range(rounds):
            others = seconds = 0.0
            for way in names[turn % 3 :] + names[: turn % 3]:
                ask(
                    ways[way], 1
                )  # what waited for its turn has lost its caches, and the slower way would lose more
                before, begin = busy(), time.monotonic()
                results = ask(ways[way], count)
                seconds += time.monotonic() - begin
                others += (
                    busy() - before - sum(record["cpu"] for r in results for record in r["steps"])
                )
                add(found, way, results, case.batch_size)
            found.others.append(max(others, 0.0) / seconds)
        for _ in range(rounds):
            ask(pair, 1)
            found.writes.append(ask(pair, "save")[0])
    finally:
        for rank in (*single, *pair):
            rank.end()
    return found


def add(found: Measured, way: str, results: list[dict], batch_size: int) -> None:
    """Adds the answers of the ranks of one way to one round."""
    seconds = [
        sum(record["step"] for record in result["steps"]) / len(result["steps"])
        for result in results
    ]
    if way == TOGETHER:  # the samples of a step are there when the slower rank is done
        found.rates[way].append(batch_size * len(seconds) / max(seconds))
        found.collectives += results[0]["collectives"]
        found.adapter_bytes = results[0]["adapter_bytes"]
    else:
        found.rates[way].append(sum(batch_size / s for s in seconds))
    for records in zip(*(result["steps"] for result in results), strict=True):
        first = dict(records[0])
        pairs = zip(*(record["reductions"] for record in records), strict=True)
        first["waiting"] = sum(max(begin for begin, _ in both) - both[0][0] for both in pairs)
        first["reduction"] -= first["waiting"]
        found.steps[way].append(first)


def show(case: Case, found: Measured) -> list[tuple[str, bool, bool]]:
    """Prints a case; returns what its bars say, whether they are met, and whether they depend on
    the clock."""
    print(
        f"\n{case.name}: {len(found.rates[ALONE])} rounds, medians of {len(found.steps[ALONE])} steps of rank 0"
    )
    print(f"{'ms':18}" + "".join(f"{part:>{WIDTH[part]}}" for part in PARTS) + f"{'samples/s':>11}")
    for way, steps in found.steps.items():
        times = "".join(
            f"{1000 * median(step[part] for step in steps):{WIDTH[part]}.1f}" for part in PARTS
        )
        print(f"{way:18}{times}{median(found.rates[way]):11.3f}")
    result, quiet = [], found.quiet()
    for name, rounds in (("all rounds", range(len(found.others))), ("the quieter half", quiet)):
        least, most = min(found.others[i] for i in rounds), max(found.others[i] for i in rounds)
        print(
            f"{name}, other processes at {least:.2f} to {most:.2f} cores: {TOGETHER} over {ALONE} "
            f"{found.ratio(ALONE, rounds):.3f}, over {APART} {found.ratio(APART, rounds):.3f}"
        )
    ratio = found.ratio(ALONE, quiet)
    what = f"{case.name}: {ratio:.3f} times the samples per second of 1 rank, bar {THROUGHPUT_BAR}"
    if case.unet:  # the bar is for steps of a real size; how a short one scales is shown beside it
        result.append((what, ratio >= THROUGHPUT_BAR, True))
    cpu = median(step["cpu"] for step in found.steps[TOGETHER]) / median(
        step["cpu"] for step in found.steps[ALONE]
    )
    print(f"CPU seconds per step and rank, {TOGETHER} over {ALONE}: {cpu:.3f}")
    steps = len(found.steps[TOGETHER])
    sent = [
        (name, group, types[0], size(types, sizes))
        for name, group, types, sizes in found.collectives
    ]
    for kind in sorted(set(sent)):
        name, group, _, nbytes = kind
        print(f"  {sent.count(kind) / steps:g} per step: {name}, {nbytes:,} bytes, group {group}")
    wanted = [
        ("gloo:all_reduce", "Float", found.adapter_bytes),
        ("gloo:all_reduce", "Long", 8),
    ] * steps
    met = sorted(wanted) == sorted((name, kind, nbytes) for name, _, kind, nbytes in sent)
    what = f"{case.name}: per step one all-reduce of the adapters' {found.adapter_bytes:,} bytes, one of 8, no more"
    result.append((what, met, False))
    files = found.writes[-1]["files"]
    print(
        f"checkpoint: {median(w['write'] for w in found.writes) * 1000:.0f} ms, {sum(files.values()):,} bytes: "
        + ", ".join(f"{name} {nbytes:,}" for name, nbytes in sorted(files.items()))
    )
    return result


def size(types: list[str], sizes: list[list[int]]) -> int:
    total = 0
    for one, shape in zip(types, sizes, strict=True):
        elements = 1
        for side in shape:
            elements *= side
        total += elements * SIZES[one]
    return total


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and a line per bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one round")
    parser.add_argument(
        "--paper", action="store_true", help="bytes and seconds of large runs, reckoned"
    )
    given = parser.parse_args(arguments)
    if given.paper:
        from benchmarks import on_paper

        return on_paper.main()
    from benchmarks import stopping

    bars = []
    with tempfile.TemporaryDirectory() as name:
        for number, case in enumerate(TINY if given.tiny else CASES):
            rounds, steps = (1, 2) if given.tiny else (given.rounds, given.steps)
            folder = Path(name) / str(number)
            bars += show(case, measure(case, folder, rounds, steps))
            shutil.rmtree(folder)
        bars += stopping.stops(Path(name), 1 if given.tiny else 3)
    print()
    for what, met, _ in bars:
        print(f"{what}: {'ok' if met else 'NOT OK'}")
    return int(not all(met for _, met, timed in bars if not (timed and given.tiny)))


if __name__ == "__main__":
    sys.exit(main())
