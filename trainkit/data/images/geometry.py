"""From an image's size to the stored one: how it is cropped, scaled, rotated and padded."""

# H/W target height and width in pixels; sizes are (width, height), as in Pillow

from PIL import Image

from trainkit.data import faults
from trainkit.data.faults import RejectedImage
from trainkit.data.settings import PreparationSettings

MAX_ASPECT = 8  # of images stored with random_crop, relative to the target: bounds the size of very long images
ORIENTATION_TAG = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or if the EXIF block is broken."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # whatever a malformed block makes Pillow raise
        return 1


def shown_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the size of an upright image whose file holds it in `size`, or the reverse."""
    return size[::-1] if orientation in (5, 6, 7, 8) else size


def plan_resize(
    size: tuple[int, int], settings: PreparationSettings, orientation: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size of the central part of an image that is kept, and the size that it is resized to.

    Both are in the frame of the file, which is rotated by 90 degrees with EXIF orientations 5 to 8.
    """
    target = shown_size((settings.width, settings.height), orientation)
    if settings.resize_mode == "stretch":
        return size, target
    if settings.resize_mode == "pad":
        return size, fitting_size(size, target)
    part = bounded_part(size, target)
    return part, covering_size(part, target)


def plan_like(
    size: tuple[int, int], settings: PreparationSettings, orientation: int, like: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the size that an image of `size` counts as, and `plan_resize` of it.

    That is its own or, for a conditioning image, that of its image: `like`, as shown. Raises `RejectedImage`:
    conditioning_image_size.
    """
    full = size
    if like is not None:
        full = shown_size(like, orientation)
        if not is_same_shape(size, full):
            raise RejectedImage(
                faults.CONDITION_SIZE,
                f"it is {size[0]}x{size[1]} pixels and its image {full[0]}x{full[1]}, not of the same shape",
            )
    return full, *plan_resize(full, settings, orientation)


def is_same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are equal, or one is the other scaled and rounded to whole pixels."""
    if size[0] == other[0] or size[1] == other[1]:
        return size == other
    lowest, highest = (
        [(ours + error) / theirs for ours, theirs in zip(size, other, strict=True)] for error in (-0.5, 0.5)
    )  # factors that round to these sides
    return max(lowest) < min(highest)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) of the aspect of `size` that covers `target`, rounded as by torchvision."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height >= target_height * width:
        return target_width, height * target_width // width
    return width * target_height // height, target_height


def fitting_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (width, height) of the same aspect as `size` inside `target`, of at least one pixel."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height <= target_height * width:
        return target_width, max(1, round(height * target_width / width))
    return max(1, round(width * target_height / height)), target_height


def bounded_part(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return `size` with its longer side cut to at most `MAX_ASPECT` targets in a row."""
    (width, height), (target_width, target_height) = size, target
    widest = max(1, MAX_ASPECT * height * target_width // target_height)
    highest = max(1, MAX_ASPECT * width * target_height // target_width)
    return min(width, widest), min(height, highest)


def middle_part(image: Image.Image, size: tuple[int, int], part: tuple[int, int]) -> Image.Image:
    """Return the centre `part` of an image whose full size is `size`, also if it was decoded at a fraction of it."""
    if part == size:
        return image
    width = max(1, round(part[0] * image.width / size[0]))
    height = max(1, round(part[1] * image.height / size[1]))
    return image.crop(center_box(image.size, (width, height)))


def center_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of torchvision's CenterCrop."""
    left, top = round((size[0] - target[0]) / 2), round((size[1] - target[1]) / 2)
    return left, top, left + target[0], top + target[1]
