"""Control images as FLUX.2's image processor takes, shrinks and crops them."""

from models.controls import ControlSize, limited_area, rounded_down

MAX_CONTROL_PIXELS = 1024 * 1024
"""Area to which larger control images are shrunk."""
MIN_CONTROL_SIDE = 64
MAX_CONTROL_RATIO = 8


def side_error(width: int, height: int, model: str) -> str | None:
    """Return an error if the image processor refuses a control image of this size."""
    ratio = max(width / height, height / width)
    if min(width, height) >= MIN_CONTROL_SIDE and ratio <= MAX_CONTROL_RATIO:
        return None
    return (
        f"a control image of {width}x{height}; {model} takes sides of at least {MIN_CONTROL_SIDE} "
        f"pixels, and one side at most {MAX_CONTROL_RATIO} times the other"
    )


def cropped_size(width: int, height: int, max_pixels: int | None, step: int) -> ControlSize:
    """Return the size of a control image, whose sides are cropped to multiples of `step`.

    `max_pixels`: an option's limit below that of the image processor. None: no other limit."""
    limit = MAX_CONTROL_PIXELS
    if max_pixels is not None:
        limit = min(limit, max_pixels)
    scaled_width, scaled_height = limited_area(width, height, limit)
    return ControlSize(
        scaled_width=max(int(scaled_width), step),
        scaled_height=max(int(scaled_height), step),
        width=rounded_down(scaled_width, step),
        height=rounded_down(scaled_height, step),
    )
