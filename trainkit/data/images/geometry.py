"""From an image's own size to the stored one: what part of it is kept, how it is scaled, turned, cut and padded."""

# H/W target height and width in pixels; sizes are (width, height), as in Pillow

from PIL import Image

from trainkit.data.settings import PreparationSettings

MAX_ASPECT = 8  # of what is stored with random_crop, by the aspect of the target: bounds what a sliver grows to
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
    """EXIF orientation, 1 (upright) where there is none or where the EXIF block is broken: the pixels are not."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # whatever a malformed block makes Pillow raise
        return 1


def plan_resize(
    size: tuple[int, int], settings: PreparationSettings, orientation: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of the middle part of an image that is kept, and the size that part is resized to.

    Both in the stored frame, which lies on its side with EXIF orientations 5 to 8.
    """
    target = (settings.width, settings.height)
    if orientation in (5, 6, 7, 8):
        target = target[::-1]
    if settings.resize_mode == "stretch":
        return size, target
    if settings.resize_mode == "pad":
        return size, fitting_size(size, target)
    part = bounded_part(size, target)
    return part, covering_size(part, target)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of the same aspect as `size` that covers `target`, as torchvision rounds it."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height >= target_height * width:
        return target_width, height * target_width // width
    return width * target_height // height, target_height


def fitting_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of the same aspect as `size` inside `target`, of at least one pixel."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height <= target_height * width:
        return target_width, max(1, round(height * target_width / width))
    return max(1, round(width * target_height / height)), target_height


def bounded_part(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """`size` with its longer side cut to what covers at most `MAX_ASPECT` targets in a row."""
    (width, height), (target_width, target_height) = size, target
    widest = max(1, MAX_ASPECT * height * target_width // target_height)
    highest = max(1, MAX_ASPECT * width * target_height // target_width)
    return min(width, widest), min(height, highest)


def middle_part(image: Image.Image, size: tuple[int, int], part: tuple[int, int]) -> Image.Image:
    """The centre `part` of an image whose full size is `size`, also where it was decoded at a fraction of that."""
    if part == size:
        return image
    width = max(1, round(part[0] * image.width / size[0]))
    height = max(1, round(part[1] * image.height / size[1]))
    return image.crop(center_box(image.size, (width, height)))


def center_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where torchvision's CenterCrop cuts."""
    left, top = round((size[0] - target[0]) / 2), round((size[1] - target[1]) / 2)
    return left, top, left + target[0], top + target[1]
