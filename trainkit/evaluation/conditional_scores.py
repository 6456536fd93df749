"""Scores of conditional samples: a judge of their classes, scores per class, retrieval of captions."""

from typing import Any

from trainkit.data.files import cache_root
from trainkit.evaluation.classifier import open_classifier
from trainkit.evaluation.conditioning import (
    caption_retrieval,
    check_requested_labels,
    label_accuracy,
    scores_per_class,
)
from trainkit.evaluation.conditions import read_annotations
from trainkit.evaluation.images import open_images
from trainkit.evaluation.reference import ScoredImages


def judge_classes(options: Any, images, indices) -> dict:
    """The share of the samples `indices` that show the requested class, by a classifier of `--classifier_data_dir`."""
    flag = "--classifier_data_dir"
    real: Any = open_images(options.classifier_data_dir, flag, skip_unreadable=True)
    requested, annotations = read_annotations(images, "--generated"), read_annotations(real, flag)
    labels = [requested.labels[index] for index in indices]
    flag = f"{flag} {options.classifier_data_dir}"
    check_requested_labels(labels, annotations.label_names, options.generated, flag)
    classifier = open_classifier(real, annotations, flag, cache_root(options.cache_dir), options.seed)
    found = label_accuracy(labels, classifier.predict(images, indices), classifier)
    return found | {"trained_on": options.classifier_data_dir, "num_unreadable": len(real.unreadable)}


def compare_conditions(options: Any, weights_sha256: str, made: ScoredImages, real: ScoredImages) -> dict:
    """Scores per class and caption retrieval, if both sides have classes or captions."""
    requested = read_annotations(made.images, "--generated")
    found: dict = {}
    if not (requested.has_labels or requested.has_texts):
        return found
    annotations = read_annotations(real.images, "--reference")

    def of_both(name: str) -> tuple[Any, list, Any, list]:
        values = [
            [getattr(side, name)[index] for index in scored.indices]
            for side, scored in ((annotations, real), (requested, made))
        ]
        return real.features, values[0], made.features, values[1]

    if requested.has_labels and annotations.has_labels:
        found["per_class"] = scores_per_class(*of_both("labels"), options.metrics, options.seed, weights_sha256)
    if requested.has_texts and annotations.has_texts:
        found["retrieval"] = caption_retrieval(*of_both("texts"), options.retrieval_captions, options.seed)
    return found
