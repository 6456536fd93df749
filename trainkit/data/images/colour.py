"""Convert any colour mode and profile to 8-bit sRGB or grey."""

# H/W pixels

import functools
import io

import numpy as np
from PIL import Image

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # one channel of more than 8 bits
BITS_PER_SAMPLE_TAG = 0x0102
SAME_COLOURS = 2  # grey levels by which a profile may differ from sRGB and still count as sRGB
GREY_MODES = ("1", "L", "LA", "La")


def standard_mode(image: Image.Image, image_mode: str) -> Image.Image:
    """Convert to L or RGB in sRGB, or to RGBA if there is transparency (also of a palette or one marked colour)."""
    if image.mode in DEEP_MODES:
        grey = Image.fromarray(np.rint(unit_samples(image) * 255).astype(np.uint8))
        seen = seen_samples(image)
        if seen is None:
            return grey
        return Image.merge("LA", (grey, Image.fromarray(seen.astype(np.uint8) * 255))).convert("RGBA")
    if image.mode == "LAB":
        return _apply(image, _lab_transform())
    transform = _transform_of(image)
    if image.mode == "CMYK" and transform is not None:
        return _apply(image, transform)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "RGBa" or image.mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA"):
        needs_colour = transform is not None and image.mode not in GREY_MODES
        image = image.convert("L" if image.mode == "1" or image_mode == "L" and not needs_colour else "RGB")
    return image if transform is None else _apply(image, transform)


def is_srgb(image: Image.Image) -> bool:
    """Whether the image has no colour profile, or one that makes no difference."""
    return _transform_of(image) is None


def unit_samples(image: Image.Image) -> np.ndarray:
    """Return the samples (H, W) of one deep channel, scaled to [0, 1] in float32 by its range, never clipped.

    If there are negative samples, 0 becomes 1/2.
    """
    samples = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    top, bottom = float(samples.max(initial=0.0)), float(samples.min(initial=0.0))
    top = max(top, -bottom)
    if image.mode == "F":  # it defines no range: the smallest common one that holds the samples
        full = next((full for full in (1.0, 255.0, 65535.0) if top <= full), top)
    elif image.format == "TIFF" and image.mode != "I":
        tags = image.tag_v2  # type: ignore[attr-defined]  # it is a TiffImageFile
        full = 2.0 ** tags.get(BITS_PER_SAMPLE_TAG, (16,))[0] - 1
    else:
        full = 65535.0 if top <= 65535.0 else 2.0**31 - 1
    samples = np.clip(samples / full, -1.0, 1.0)
    return (samples + 1) / 2 if bottom < 0 else samples


def seen_samples(image: Image.Image) -> np.ndarray | None:
    """Return which samples (H, W) of one deep channel are not the transparent grey of a PNG; None if it has none."""
    transparent = image.info.get("transparency")
    return np.asarray(image) != transparent if isinstance(transparent, int) else None


def _transform_of(image: Image.Image):
    profile = image.info.get("icc_profile")
    if not profile or image.mode in DEEP_MODES:
        return None
    kind = "GRAY" if image.mode in GREY_MODES else "CMYK" if image.mode == "CMYK" else "RGB"
    return _profile_transform(bytes(profile), kind)


@functools.lru_cache(maxsize=64)  # a collection has few profiles, and building a transform takes milliseconds
def _profile_transform(profile: bytes, kind: str):
    """Return the transform from an ICC profile of a `kind` (GRAY, RGB, CMYK) to sRGB: 256 greys, or one of ImageCms.

    None if it is sRGB to within `SAME_COLOURS`, broken, or of another kind; the samples are then used unchanged.
    """
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != kind:
            return None
        mode = {"GRAY": "L"}.get(kind, kind)
        transform = _build_transform(opened, mode)
        if kind == "GRAY":
            ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
            table = np.asarray(ImageCms.applyTransform(ramp, transform))[0, :, 1]
            return None if _same(table, np.arange(256)) else tuple(table.tolist())
        if kind == "RGB":
            levels = np.arange(0, 256, 17, dtype=np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
            if _same(np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform)), grid):
                return None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@functools.cache
def _lab_transform():
    from PIL import ImageCms

    return _build_transform(ImageCms.createProfile("LAB"), "LAB")


def _build_transform(profile, mode: str):
    from PIL import ImageCms

    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _same(samples: np.ndarray, others: np.ndarray) -> bool:
    return np.abs(samples.astype(int) - others.astype(int)).max() <= SAME_COLOURS


def _apply(image: Image.Image, transform) -> Image.Image:
    from PIL import ImageCms

    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if isinstance(transform, tuple):
        image = image.convert("RGB") if alpha else image
        image = image.point(transform * len(image.getbands()))
    else:
        applied = ImageCms.applyTransform(image.convert("RGB") if alpha else image, transform)
        assert applied is not None  # as it would be in place
        image = applied
    if alpha:
        image.putalpha(alpha)
    return image
