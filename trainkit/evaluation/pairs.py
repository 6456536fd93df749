"""How near are samples to the true image of their condition? PSNR, SSIM, and the variety over the seeds.

A sample and its true image have one name: that of the conditioning image by the metadata.jsonl of sample.py, else the
name of the sample. Extensions do not count.
"""

# N samples, K conditions, H/W pixels

import json
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from trainkit.errors import UserError, one_line
from trainkit.evaluation.images import ImageArray, ImageFolder, PreparedFolder
from trainkit.evaluation.reference import ScoredImages

MAX_PSNR = 100.0  # dB, of equal images
SSIM_WINDOW = 11  # pixels (Wang et al. 2004)
METADATA_NAME = "metadata.jsonl"


def compare_pairs(made: ScoredImages, real: ScoredImages) -> dict:
    """PSNR and SSIM of samples against the reference images of the same names.

    With several samples per condition the result also has the PSNR of their mean and their standard deviation.
    Raises `UserError` if a sample has no partner of its size.
    """
    names = _requested(made.images) or _names(made.images)
    known = _names(real.images)
    partners = {known[index]: index for index in real.indices.tolist()}
    lost = [names[index] for index in made.indices if names[index] not in partners]
    if lost:
        raise UserError(
            f"--paired: --reference has no image {lost[0]}, the true image of a sample ({len(lost)} of "
            f"{len(made.indices)} have none): give the images that the conditions were made from"
        )
    groups: dict[str, list[int]] = {}
    for index in made.indices.tolist():
        groups.setdefault(names[index], []).append(index)
    rows = [_compare(made.images, real.images, indices, partners[name]) for name, indices in groups.items()]
    return _summary(rows, len(made.indices))


def _compare(made: Any, real: Any, indices: list[int], partner: int) -> dict[str, list[float]]:
    """The scores of the samples `indices` of one condition."""
    truth = real.pixels(partner).astype(np.float32)
    samples = [made.pixels(index).astype(np.float32) for index in indices]
    if samples[0].shape != truth.shape:
        sizes = [f"{shape[0]}x{shape[1]}" for shape in (samples[0].shape, truth.shape)]
        raise UserError(
            f"--paired: a sample is {sizes[0]} (HxW), its true image in --reference {sizes[1]}: give the reference "
            "in the size of the samples, for example prepared with --resolution"
        )
    found = {"psnr": [psnr(sample, truth) for sample in samples]}
    if min(truth.shape[:2]) >= SSIM_WINDOW:
        found["ssim"] = [ssim(sample, truth) for sample in samples]
    if len(samples) > 1:
        found["psnr_of_mean"] = [psnr(np.mean(samples, axis=0), truth)]
        found["deviation"] = [float(np.std(samples, axis=0, ddof=1).mean())]
    return found


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB of images (H, W, 3) in [0, 255], at most `MAX_PSNR`."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(torch.from_numpy(image), torch.from_numpy(truth), data_range=255.0)
    return min(MAX_PSNR, float(found))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """The structural similarity of images (H, W, 3) in [0, 255], the mean over their channels (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    one, other = (torch.from_numpy(pixels).permute(2, 0, 1)[None] for pixels in (image, truth))
    found = structural_similarity_index_measure(one, other, data_range=255.0)
    assert isinstance(found, torch.Tensor)  # the full image as well only if asked for
    return float(found)


def _summary(rows: list[dict[str, list[float]]], num_samples: int) -> dict:
    """Means over all samples and, for `psnr_of_mean` and `deviation`, over the conditions with several."""
    summary: dict[str, Any] = {"n": num_samples, "num_conditions": len(rows)}
    for name in ("psnr", "ssim", "psnr_of_mean", "deviation"):
        means = np.array([np.mean(row[name]) for row in rows if name in row])
        if len(means):
            summary[name] = float(means.mean())
        if name in ("psnr", "ssim") and len(means) > 1:
            summary[f"{name}_se"] = float(means.std(ddof=1) / np.sqrt(len(means)))
    return summary


def _requested(images: Any) -> list[str] | None:
    """The conditioning image of each sample, without extension; None unless all have one."""
    if isinstance(images, ImageArray):
        return None if images.conditioning is None else [_stem(name) for name in images.conditioning]
    if not isinstance(images, ImageFolder) or not (images.folder / METADATA_NAME).is_file():
        return None
    try:
        lines = (images.folder / METADATA_NAME).read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if line.strip() and isinstance(row := json.loads(line), dict)]
    except ValueError as error:
        raise UserError(f"--generated: {images.folder / METADATA_NAME} is not JSON lines: {one_line(error)}") from None
    by_file = {row.get("file_name"): row.get("conditioning_image") for row in rows}
    found = [by_file.get(file.relative_to(images.folder).as_posix()) for file in images.files]
    return None if any(name is None for name in found) else [_stem(str(name)) for name in found]


def _names(images: Any) -> list[str]:
    if isinstance(images, ImageFolder):
        return [_stem(file.relative_to(images.folder).as_posix()) for file in images.files]
    if isinstance(images, PreparedFolder):
        return [_stem(name) for name in images.images.sources(np.arange(len(images)))]
    return [str(number) for number in range(len(images))]


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
