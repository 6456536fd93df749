"""Do samples show what was requested? Classifier accuracy, scores per class, caption retrieval."""

# N samples, M real images, D dimensions of a feature, K captions to choose among

import math

import numpy as np
import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.evaluation.classifier import Classifier
from trainkit.evaluation.conditions import NULL
from trainkit.evaluation.metrics import noise_floor, scores
from trainkit.evaluation.report import comparability

MIN_GENERATED, MIN_REFERENCE = 2, 4  # images that a class needs for a score
CONFIDENCE_Z = 1.96  # 95 %


def proportion(hits: int, count: int) -> dict:
    """A share with its 95 % interval (Wilson 1927), which is valid for few samples and near 0 and 1."""
    share, z2 = hits / count, CONFIDENCE_Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = CONFIDENCE_Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return {"share": share, "n": count, "interval": [max(0.0, centre - half), min(1.0, centre + half)]}


def check_requested_labels(
    requested: list[str | None], classifier_labels: list[str], generated: str, flag: str
) -> None:
    """Raise `UserError` if no sample has a requested class, or one has a class that the classifier does not know."""
    named = {label for label in requested if label is not None}
    unknown = sorted(named - {*classifier_labels, NULL})
    if unknown:
        raise UserError(
            f"{flag} has no class {unknown[0]}, which was requested for --generated {generated} (it has "
            f"{', '.join(classifier_labels[:8])}{', ...' if len(classifier_labels) > 8 else ''}): give the images "
            "that the model was trained on"
        )
    if not named & {*classifier_labels}:
        raise UserError(
            f"{flag} needs the requested class of each image of --generated {generated}: metadata.jsonl as "
            "sample.py --class_labels writes it, or class folders; or leave the flag out"
        )


def label_accuracy(requested: list[str | None], found: list[str], classifier: Classifier) -> dict:
    """The share of samples classified as the requested class, in total and per class, and the confusion matrix.

    Samples without a class (or of the null class) are only counted in `num_without_label`. `confusion`[i][j] counts
    samples of requested class `labels`[i] classified as `labels`[j].
    """
    labels = classifier.labels
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    for label, found_label in zip(requested, found, strict=True):
        if label in labels:
            confusion[labels.index(label), labels.index(found_label)] += 1
    count = int(confusion.sum())
    return proportion(int(confusion.trace()), count) | {
        "per_class": {
            label: proportion(int(row[number]), int(row.sum()))
            for number, (label, row) in enumerate(zip(labels, confusion, strict=True))
            if row.sum()
        },
        "num_without_label": len(requested) - count,
        "chance": 1 / len(labels),
        "classifier": proportion(round(classifier.accuracy * classifier.num_held_out), classifier.num_held_out),
        "labels": labels,
        "confusion": confusion.tolist(),
    }


def scores_per_class(
    reference: Tensor,
    reference_labels: list[str | None],
    generated: Tensor,
    generated_labels: list[str | None],
    metrics: list[str],
    seed: int,
    weights_sha256: str = "",
) -> dict[str, dict]:
    """The metrics of features (M, D) and (N, D) per class with enough images on both sides, with the noise floor."""
    found = {}
    for label in dict.fromkeys(name for name in reference_labels if name is not None):
        real = reference[[name == label for name in reference_labels]]
        made = generated[[name == label for name in generated_labels]]
        if len(made) < MIN_GENERATED or len(real) < MIN_REFERENCE:
            continue
        floor, floor_size = noise_floor(real, max(2, len(made)), metrics, seed)
        found[label] = {
            "scores": scores(real, made, metrics, seed),
            "noise_floor": floor,
            "num_noise_floor": floor_size,
            "num_generated": len(made),
            "num_reference": len(real),
            "note": comparability(weights_sha256, len(made), len(real)),
        }
    return found


def caption_retrieval(
    reference: Tensor,
    reference_texts: list[str | None],
    generated: Tensor,
    generated_texts: list[str | None],
    num_captions: int,
    seed: int,
) -> dict | None:
    """How often a sample is nearer to the real images of its caption than to those of K - 1 other captions.

    Nearness is the cosine of image features (M, D) and (N, D), centred by the mean of all real images. The features of
    a caption are the mean over its images. The other captions are drawn by `seed` and the sample's number. Samples
    whose caption has no real image are not judged. None for fewer than two captions, or if no sample can be judged.
    """
    centre = reference.mean(dim=0)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(reference_texts):
        if text is not None:
            rows.setdefault(text, []).append(row)
    captions = list(rows)
    numbers = {text: number for number, text in enumerate(captions)}
    judged = [(row, numbers[text]) for row, text in enumerate(generated_texts) if text in rows]
    if len(captions) < 2 or not judged:
        return None
    prototypes = torch.stack([reference[rows[text]].mean(dim=0) for text in captions]) - centre
    prototypes = torch.nn.functional.normalize(prototypes, dim=1)
    num_captions = min(num_captions, len(captions))
    hits = 0
    for row, own in judged:
        others = np.random.default_rng((seed, row)).permutation(len(captions) - 1)[: num_captions - 1]
        choices = np.concatenate([[own], others + (others >= own)])
        nearness = prototypes[choices] @ (generated[row] - centre)
        hits += int(nearness[0] > nearness[1:].max())
    return proportion(hits, len(judged)) | {
        "num_captions": num_captions,
        "chance": 1 / num_captions,
        "num_not_judged": len(generated_texts) - len(judged),
    }
