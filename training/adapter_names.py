"""Names of the adapter files that a run exports, and which program reads which. Imports no torch."""

COMFYUI_FORMATS = ("comfyui", "kohya")
"""Formats that ComfyUI reads for each model, the best one first."""
DEFAULT_FORMAT = ""
"""The format that most programs load for the model: that of a run without export.formats."""


def adapter_name(name: str, file_format: str, position: int) -> str:
    """Return the name of a file, or of PEFT's folder. `position`: of the format among all of the run."""
    if file_format == "peft":
        return f"{name}.peft"
    if position == 0:
        return f"{name}.safetensors"
    return f"{name}.{file_format}.safetensors"


def adapter_names(name: str, formats: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Return the file or folder of each format. `name`: export.name, perhaps with a step."""
    names = {}
    for position, file_format in enumerate(formats or [DEFAULT_FORMAT]):
        names[file_format] = adapter_name(name, file_format, position)
    return names


def comfyui_adapter(names: dict[str, str], reads_diffusers: bool) -> str | None:
    """Return the file that ComfyUI reads; None if there is no such file.

    `reads_diffusers`: whether ComfyUI reads LoRAs of the model in diffusers' format."""
    readable_formats = [*COMFYUI_FORMATS, DEFAULT_FORMAT]
    if reads_diffusers:
        readable_formats.append("diffusers")
    for file_format in readable_formats:
        if file_format in names:
            return names[file_format]
    return None


def diffusers_adapter(names: dict[str, str]) -> str | None:
    """Return the file that diffusers reads, if the adapter is a LoRA; None if there is no such file."""
    for file_format in ("diffusers", DEFAULT_FORMAT, "kohya"):
        if file_format in names:
            return names[file_format]
    return None
