"""Do samples show what they were asked for? Accuracy by a classifier, scores a class, captions found again."""

# N samples, M real images, D dimensions of a feature, K captions to choose among

import math

import numpy as np
import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.evaluation.classifier import Classifier
from trainkit.evaluation.conditions import NULL
from trainkit.evaluation.metrics import noise_floor, scores, why_not_comparable

MIN_GENERATED, MIN_REFERENCE = 2, 4  # images of a class that has a score
CONFIDENCE_Z = 1.96  # 95 %


def proportion(hits: int, count: int) -> dict:
    """A share with its 95 % interval (Wilson 1927), which holds for few samples and near 0 and 1."""
    share, z2 = hits / count, CONFIDENCE_Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = CONFIDENCE_Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return {"share": share, "n": count, "interval": [max(0.0, centre - half), min(1.0, centre + half)]}


def check_asked_labels(asked: list[str | None], classifier_labels: list[str], generated: str, flag: str) -> None:
    """Raise `UserError` where no sample says which class it should show, or one that the classifier does not know."""
    named = {label for label in asked if label is not None}
    unknown = sorted(named - {*classifier_labels, NULL})
    if unknown:
        raise UserError(
            f"{flag} has no class {unknown[0]}, which --generated {generated} was asked for (it has "
            f"{', '.join(classifier_labels[:8])}{', ...' if len(classifier_labels) > 8 else ''}): give the images "
            "that the model was trained on"
        )
    if not named & {*classifier_labels}:
        raise UserError(
            f"{flag} needs to know which class each image of --generated {generated} should show: metadata.jsonl as "
            "sample.py --class_labels writes it, or class folders; or leave the flag out"
        )


def label_accuracy(asked: list[str | None], found: list[str], classifier: Classifier) -> dict:
    """How many samples are classified as the class asked for, in all and a class, and as what else.

    Samples of no class (or of the null one) are counted in `num_not_asked` alone. `confusion`[i][j]: samples asked for
    `labels`[i] and found to be `labels`[j].
    """
    labels = classifier.labels
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    for label, found_label in zip(asked, found, strict=True):
        if label in labels:
            confusion[labels.index(label), labels.index(found_label)] += 1
    count = int(confusion.sum())
    return proportion(int(confusion.trace()), count) | {
        "per_class": {
            label: proportion(int(row[number]), int(row.sum()))
            for number, (label, row) in enumerate(zip(labels, confusion, strict=True))
            if row.sum()
        },
        "num_not_asked": len(asked) - count,
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
) -> dict[str, dict]:
    """The metrics of features (M, D) and (N, D) of each class that has enough images on both sides, with its floor."""
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
            "note": why_not_comparable(min(len(made), len(real))),
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

    Near is the cosine of image features (M, D) and (N, D), a caption's being the mean of its images', each less the
    mean of all real ones. The others are drawn by `seed` and the sample's number. Samples whose caption no real image
    has are not judged. None where fewer than two captions, or no sample, can be.
    """
    centre = reference.mean(dim=0)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(reference_texts):
        if text is not None:
            rows.setdefault(text, []).append(row)
    captions = list(rows)
    numbers = {text: number for number, text in enumerate(captions)}
    asked = [(row, numbers[text]) for row, text in enumerate(generated_texts) if text in rows]
    if len(captions) < 2 or not asked:
        return None
    prototypes = torch.stack([reference[rows[text]].mean(dim=0) for text in captions]) - centre
    prototypes = torch.nn.functional.normalize(prototypes, dim=1)
    num_captions = min(num_captions, len(captions))
    hits = 0
    for row, own in asked:
        others = np.random.default_rng((seed, row)).permutation(len(captions) - 1)[: num_captions - 1]
        choices = np.concatenate([[own], others + (others >= own)])
        nearness = prototypes[choices] @ (generated[row] - centre)
        hits += int(nearness[0] > nearness[1:].max())
    return proportion(hits, len(asked)) | {
        "num_captions": num_captions,
        "chance": 1 / num_captions,
        "num_not_judged": len(generated_texts) - len(asked),
    }
