"""Scores of conditional samples: a judge of their classes, scores per class, retrieval of captions."""

from typing import Any

import numpy as np

from trainkit.data.files import cache_root
from trainkit.evaluation.classifier import open_classifier
from trainkit.evaluation.conditioning import (
    caption_retrieval,
    check_requested_labels,
    label_accuracy,
    scores_per_class,
)
from trainkit.evaluation.conditions import Annotations, read_annotations
from trainkit.evaluation.images import ImageSet, open_images
from trainkit.evaluation.reference import ScoredImages


def judge_classes(options: Any, images: ImageSet, indices: np.ndarray) -> dict:
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
    requested, found = read_annotations(made.images, "--generated"), dict[str, Any]()
    if not (requested.has_labels or requested.has_texts):
        return found
    annotations = read_annotations(real.images, "--reference")

    def of(side: Annotations, scored: ScoredImages, name: str) -> list:
        return [getattr(side, name)[index] for index in scored.indices]

    if requested.has_labels and annotations.has_labels:
        labels = of(annotations, real, "labels"), of(requested, made, "labels")
        found["per_class"] = scores_per_class(
            real.features, labels[0], made.features, labels[1], options.metrics, options.seed, weights_sha256
        )
    if requested.has_texts and annotations.has_texts:
        texts = of(annotations, real, "texts"), of(requested, made, "texts")
        found["retrieval"] = caption_retrieval(
            real.features, texts[0], made.features, texts[1], options.retrieval_captions, options.seed
        )
    return found
