"""Options of what a run writes: samples, checkpoints, metrics, adapter files. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adapter_files import FORMATS
from common.config_fields import STRICT

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]

TrackerName = Literal[
    "none",
    "wandb",
    "tensorboard",
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "trackio",
]


@dataclass(frozen=True)
class SampleConfig:
    """Sample images: those of preview.png, drawn before and after training, and those that are drawn
    while the model trains. A prompt always has the same noise."""

    __pydantic_config__ = STRICT

    every: Annotated[int, Field(ge=0)] = 0
    """Draw samples every so many steps, into output_dir/samples. 0: never."""
    at_start: bool = False
    """With every: also draw samples before the first step."""
    prompts: tuple[str, ...] = ()
    """Prompts. None given: the first four captions of the validation images, or of the training
    images. Options of one image follow its prompt: --n negative prompt, --w width, --h height, --d
    seed, --l guidance scale, --s denoising steps, --am strength of the adapter, --ci a control image for
    models that edit: "a cat --w 768 --s 20"."""
    prompt_file: str | None = None
    """A UTF-8 text file with further prompts, one per line."""
    grid: Annotated[int, Field(ge=0, le=20)] = 0
    """With export.every: after the last step, draw each prompt with the last so many exported steps at
    each of grid_strengths, and write a picture for each prompt. 0: none."""
    grid_strengths: Annotated[
        tuple[Annotated[float, Field(ge=-10, le=10)], ...], Field(min_length=1)
    ] = (0.5, 0.75, 1.0, 1.25)
    """Strengths of the adapter in the grid: factors on its update."""
    score_model: str | None = None
    """A folder with a CLIP model of transformers. With every: measure how well samples fit their prompts,
    on the CPU."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 30
    """Denoising steps per image."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance scale. For guidance-distilled models such as FLUX.1 dev: the guidance
    input."""
    assistant_strength: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Strength of model.assistant_lora in samples. 0: samples show the adapter on the distilled model."""
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0
    """Seed of the noise; prompt number n uses seed + n."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a stopped run is resumed."""

    __pydantic_config__ = STRICT

    every: Annotated[int, Field(ge=0)] = 100
    """Save every so many steps into output_dir/checkpoints. 0: only after the last step."""
    every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Save also when this many minutes have passed since the last checkpoint. 0: off. To save at
    once, create a file named `save` in output_dir."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep, the newest ones."""
    keep_best: bool = False
    """Keep the weights with the lowest validation loss so far in every checkpoint, for
    export.weights."""


@dataclass(frozen=True)
class TrackingConfig:
    """Metrics and logs."""

    __pydantic_config__ = STRICT

    report_to: TrackerName = "none"
    """Tracker, of those that Accelerate supports; its package must be installed. wandb runs offline, into
    output_dir, if no API key is set."""
    project: str = "train-lora"
    """Project name in the tracker."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Read the losses from the device, check that they are finite and report them every so many
    steps."""
    artifacts: bool = False
    """With wandb: store the exported adapters and the samples of the last step as artifacts."""
    log_samples: bool = False
    """Write output_dir/sample_log/rank_<n>.jsonl: step, sample index, dataset row, noise quantile and
    a hash of the noise of every training sample. For comparing runs."""


@dataclass(frozen=True)
class ExportConfig:
    """Adapter files, and the other files written after the last step."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "lora"
    """The adapter is written to output_dir/<name>.safetensors, further formats to
    <name>.<format>.safetensors."""
    every: Annotated[int, Field(ge=0)] = 0
    """Also write the adapter every so many steps, to <name>-step<number>.safetensors. 0: only after the
    last step."""
    weights: Literal["last", "best"] = "last"
    """Weights to export at the end: those after the last step, or those with the lowest validation
    loss (which are then kept)."""
    formats: tuple[FormatName, ...] = ()
    """File formats, one or several. None given: the one that most programs load for this model.
    kohya: ComfyUI, A1111, Forge and, for LoRA, diffusers. comfyui: the names of ComfyUI's trainer.
    diffusers: load_lora_weights, for LoRA and DoRA. peft: a folder <name>.peft for PeftModel, with
    one algorithm among LoRA, DoRA, LoHa and LoKr.
    """
    convert: Literal["none", "lora-exact", "lora-svd", "full"] = "none"
    """Write the update as another algorithm. lora-exact: LoHa and LoKr as the same function in a
    larger LoRA. lora-svd: any algorithm as the nearest LoRA of rank svd_rank. full: any algorithm
    as whole matrices (.diff).
    """
    svd_rank: Annotated[int, Field(ge=1)] = 16
    """Rank for lora-svd."""
    metadata: Literal["public", "full", "none"] = "public"
    """Metadata of adapter files. public: what other programs show, and all options, with the names of
    files and folders but without their paths. full: the paths too, from which the run can be repeated.
    none: only what is needed to load and continue the adapter."""
    trigger_words: str | None = None
    """Trigger words written into the metadata, for programs that show them."""
    merged_model: bool = False
    """Also write output_dir/model_with_lora: the base model with the adapter merged, as a diffusers
    folder."""


@dataclass(frozen=True)
class HubConfig:
    """Publication on the Hugging Face Hub at the end of a run."""

    __pydantic_config__ = STRICT

    push: str | None = None
    """A repository, as user/name: after the last step, upload the adapter, samples and a model card. It
    needs a token: hf auth login, or HF_TOKEN. With HF_HUB_OFFLINE, only write the folder."""
    public: bool = False
    """Make a new repository public. Existing ones stay as they are."""
    license: str | None = None
    """License in the model card, as the Hub names it, such as apache-2.0."""
