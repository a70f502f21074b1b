"""Smaller control images. The pipelines scale them to a million pixels, which takes minutes on a CPU.

Both the pipelines and the families read the constants and functions that are replaced here. TRUE_SIZES and
true_dimensions are the real ones.
"""

from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

SHRINK = 8
"""Factor on the sides."""
TRUE_SIZES = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
true_dimensions = pipeline_qwenimage_edit_plus.calculate_dimensions


def shrunk_dimensions(area: float, ratio: float) -> tuple[int, int]:
    width, height = true_dimensions(area / SHRINK**2, ratio)
    return max(32, width), max(32, height)


def shrink() -> None:
    """Replace the sizes in the modules of the pipelines."""
    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [
        (width // SHRINK, height // SHRINK) for width, height in TRUE_SIZES
    ]
    pipeline_qwenimage_edit_plus.calculate_dimensions = shrunk_dimensions
    pipeline_qwenimage_edit.calculate_dimensions = lambda *size: (*shrunk_dimensions(*size), None)
