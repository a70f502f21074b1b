"""Writes the tables of docs/memory.md, and the list of `train_lora.py models`.

    python benchmarks/plan_table.py [MODEL ...]

The recipes are planned for each released model that they train. With names of models, only these
are planned, and the other rows stay. Each row is written at once. All of them take more than half an
hour.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from models.released import released_models  # noqa: E402
from tools.catalog.planned import (  # noqa: E402
    CARDS,
    PLANNED_FILE,
    WAYS,
    PlannedModel,
    planned_models,
)
from tools.planning.plan import on_the_cpu, with_configurations  # noqa: E402
from tools.planning.report import gib  # noqa: E402
from training.cli import read_recipe  # noqa: E402
from training.memory.changes import Changes, changed_config  # noqa: E402
from training.memory.config import GIB  # noqa: E402
from training.memory.phase_memory import CAPTIONS, IMAGES, SAMPLES, TRAINING  # noqa: E402
from training.memory.planner import RESERVE, MemoryPlanner  # noqa: E402

PAGE = PROJECT / "docs" / "memory.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
SECOND_TABLE = "What fits in training:"
SAMPLE_WAYS = ("bf16", "nf4", "bf16, offloaded")
CAPTION_WAYS: dict[str, Changes] = {
    "captions": {},
    "captions, int8": {"model.text_encoder_quantization": "int8"},
    "captions, layers": {"model.text_encoder_placement": "layers"},
}
RECIPES = {
    "Stable Diffusion 1.5": "sd15",
    "SDXL": "sdxl",
    "Stable Diffusion 1.5 Inpainting": "sd15_inpaint",
    "SDXL Inpainting": "sdxl_inpaint",
    "SD3.5 medium": "sd3",
    "SD3.5 large": "sd3",
    "FLUX.1 dev": "flux1",
    "FLUX.1 Fill dev": "flux1_fill",
    "Chroma1-HD": "chroma",
    "FLUX.2 klein 4B": "flux2_klein",
    "FLUX.2 klein 9B": "flux2_klein",
    "FLUX.2 dev": "flux2",
    "FLUX 3 Image Klein Base": "flux3",
    "Qwen-Image": "qwen_image",
    "Qwen-Image 2.1": "qwen_image_21",
    "Z-Image": "z_image",
    "Krea 2 Raw": "krea2",
    "Anima": "anima",
    "ERNIE-Image": "ernie_image",
    "Ideogram 4": "ideogram4",
    "FLUX.1 Kontext dev": "flux1_kontext",
    "Qwen-Image-Edit-2511": "qwen_image_edit_plus",
    "Z-Image-Omni-Base": "z_image_omni",
    "Wan 2.1 T2V 1.3B": "wan",
    "Wan 2.1 T2V 14B": "wan",
    "Wan 2.2 TI2V 5B": "wan",
    "Wan 2.1 I2V 14B": "wan_i2v",
    "LTX-2": "ltx2",
    "HunyuanVideo 1.5 T2V 480p": "hunyuan_video15",
}
"""Released model -> recipe."""


@dataclass(frozen=True)
class Row:
    """A model, what is trained, and the GPU memory that each part of a run needs."""

    model: str
    sample: str
    encoding: list[int]
    """Captions, captions with quantized encoders, captions in layers, images."""
    training: dict[str, int]
    """Way to keep the base model -> bytes."""
    samples: dict[str, int]
    """The same for samples."""

    def cells(self) -> list[str]:
        """Return the cells of the table of needs."""
        training = [self.training[way] for way in WAYS]
        samples = [self.samples[way] for way in SAMPLE_WAYS]
        sizes = [*self.encoding, *training, *samples]
        return [self.model, self.sample, *map(gib, sizes)]

    def planned(self) -> PlannedModel:
        """Return what `train_lora.py models` lists."""
        recipe = f"recipes/{RECIPES[self.model]}.yaml"
        return PlannedModel(
            model=self.model,
            family=RECIPES[self.model],
            recipe=recipe,
            hub_ids=released_models()[self.model]["hub_ids"],
            sample=self.sample,
            training={way: round(size / GIB, 2) for way, size in self.training.items()},
        )


def rows(names: Iterable[str] = RECIPES) -> Iterator[Row]:
    """Plan the models with these names."""
    return map(plan, names)


def plan(name: str) -> Row:
    """Plan one model with its recipe."""
    recipe = read_recipe(PROJECT / "recipes" / f"{RECIPES[name]}.yaml")
    hub_id = released_models()[name]["hub_ids"][0]
    with (
        on_the_cpu(),
        with_configurations(changed_config(recipe, {"model.path": hub_id})) as config,
    ):
        planner = MemoryPlanner(config, is_gpu=True)

        def need(phase: Any, changes: Changes) -> int:
            return planner.trace([phase], changes)[0].total + RESERVE

        _, *frames, height, width = planner.sample.pixels
        sample = f"{width}x{height}" + (f"x{frames[0]}" if frames else "")
        return Row(
            model=name,
            sample=f"{sample}, batch {config.batch_size}, rank {config.rank}",
            encoding=[need(CAPTIONS, changes) for changes in CAPTION_WAYS.values()]
            + [need(IMAGES, {})],
            training={way: need(TRAINING, changes) for way, changes in WAYS.items()},
            samples={way: need(SAMPLES, WAYS[way]) for way in SAMPLE_WAYS},
        )


class Tables(NamedTuple):
    """The tables: the needs of each model, and what `train_lora.py models` lists."""

    needs: dict[str, list[str]]
    """Model -> cells."""
    planned: dict[str, PlannedModel]

    @classmethod
    def of_page(cls) -> Self:
        """Return the tables that were written before."""
        _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        needs_table, _, _ = rest.partition(SECOND_TABLE)
        needs = {}
        for line in needs_table.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            needs[cells[0]] = cells
        planned = {entry.model: entry for entry in planned_models()}
        return cls(needs, planned)

    def with_row(self, row: Row) -> Self:
        """Return the tables with a new row, in the order of RECIPES."""
        needs = {**self.needs, row.model: row.cells()}
        planned = {**self.planned, row.model: row.planned()}
        return type(self)(
            {model: needs[model] for model in RECIPES if model in needs},
            {model: planned[model] for model in RECIPES if model in planned},
        )

    def markdown(self) -> str:
        """Return both tables in Markdown."""
        head = [
            "model", "sample", *CAPTION_WAYS, "images",
            *[f"train, {way}" for way in WAYS], *[f"samples, {way}" for way in SAMPLE_WAYS],
        ]  # fmt: skip
        cards = [["model", *[f"{card} GB" for card in CARDS]]]
        for model, entry in self.planned.items():
            cards.append([model, *entry.cells()])
        needs = [head, *self.needs.values()]
        return f"{markdown(needs)}\n\n{SECOND_TABLE}\n\n{markdown(cards)}"


def markdown(table: list[list[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---" * len(table[0]) + "|")
    return "\n".join(lines)


def main() -> None:
    names = sys.argv[1:] or list(RECIPES)
    unknown_names = set(names) - set(RECIPES)
    if unknown_names:
        raise SystemExit(
            f"unknown models: {', '.join(unknown_names)}; expected {', '.join(RECIPES)}"
        )
    for row in rows(names):
        write(Tables.of_page().with_row(row))


def write(new_tables: "Tables") -> None:
    """Write the page and the file of `train_lora.py models`."""
    entries = [asdict(entry) for entry in new_tables.planned.values()]
    PLANNED_FILE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    text = f"{head}{BEGIN}\n\n{new_tables.markdown()}\n\n{END}{tail}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
