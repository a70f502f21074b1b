"""The project's paths, and ways to run its script."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parent.parent.parent
FIXTURES = PROJECT / "tests" / "fixtures"
BASE = PROJECT / "examples" / "emoji" / "base"
FLOW_BASE = PROJECT / "examples" / "emoji" / "flow_base"
TWEMOJI = FIXTURES / "twemoji"
RANKS = PROJECT / "tests" / "helpers" / "ranks.py"


def reset_accelerate() -> None:
    """Forgets Accelerate's process-wide state, as a new process would."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def script(
    argv: list[str], launcher: list[str] | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Runs train_lora.py as a user does: `python train_lora.py` or through `launcher`."""
    command = [*(launcher or [sys.executable]), str(PROJECT / "train_lora.py"), *argv]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
        check=False,
    )


def accelerate_launch(*options: str) -> list[str]:
    """The launcher `accelerate launch` of the running environment."""
    return [str(Path(sys.executable).parent / "accelerate"), "launch", *options]


def write_animations(folder: Path) -> Path:
    """Writes a new folder of two animations of 9 frames with captions."""
    from PIL import Image  # not all users of this file draw

    folder.mkdir()
    for number in range(2):
        frames = [Image.new("RGB", (32, 32), (20 * i, 100 * number, 50)) for i in range(9)]
        frames[0].save(
            folder / f"{number}.webp",
            save_all=True,
            append_images=frames[1:],
            duration=63,
            lossless=True,
        )
        (folder / f"{number}.txt").write_text("a photo of a cat")
    return folder
