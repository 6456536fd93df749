"""Class labels and vectors as a user gives them, checked. This file is saved inside the models it belongs to."""

# B rows, D numbers of a vector, K classes

import difflib
import math

import numpy as np
import torch


def label_ids(labels, num_classes: int, id2label: dict | None) -> list[int]:
    """Ids (B,) from ids, names and None (null, which is K), one or several; a number that is not a name is an id.

    Raises `ValueError` naming the argument.
    """
    labels = labels.reshape(-1).tolist() if isinstance(labels, torch.Tensor | np.ndarray) else labels
    labels = list(labels) if isinstance(labels, list | tuple | range) else [labels]
    ids = {name: label for label, name in (id2label or {}).items()}
    return [_label_id(label, num_classes, ids) for label in labels]


def _label_id(label, num_classes: int, ids: dict[str, int]) -> int:
    if label is None:
        return num_classes
    if isinstance(label, str) and label in ids:
        return int(ids[label])
    if isinstance(label, str) and not label.isdecimal():
        nearest = difflib.get_close_matches(label, ids, n=1, cutoff=0)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "the model has no names, give ids"
        raise ValueError(f"class_labels: no class is called {label!r}: {hint}")
    if not isinstance(label, str) and (np.ndim(label) or not math.isfinite(label) or label != int(label)):
        raise ValueError(f"class_labels: {label} is not a whole number")
    if not 0 <= int(label) < num_classes:
        raise ValueError(f"class_labels: {label} must be 0 to {num_classes - 1} (None is the null class)")
    return int(label)


def vector_rows(vectors, length: int) -> torch.Tensor:
    """Vectors (B, D) float32 from one or several, in a tensor, an array or lists; None or all NaN is null.

    Raises `ValueError` naming the argument.
    """
    if isinstance(vectors, list | tuple):
        given = vectors if any(row is None or np.ndim(row) > 0 for row in vectors) else [vectors]
        rows = [np.full(length, np.nan) if row is None else np.asarray(row, dtype=np.float64) for row in given]
        wrong = next((row for row in rows if row.shape != (length,)), None)
        if wrong is not None:
            raise ValueError(f"vectors: {wrong.size} numbers in a vector, the model accepts {length}")
        vectors = np.stack(rows)
    vectors = torch.as_tensor(vectors, dtype=torch.float32)
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or vectors.shape[1] != length:
        raise ValueError(f"vectors: shape {tuple(vectors.shape)}, the model accepts (images, {length})")
    if not (vectors.isfinite().all(dim=1) | vectors.isnan().all(dim=1)).all():
        raise ValueError("vectors: every number must be finite; None, or a row of NaN, is the null condition")
    return vectors


def check_counts(*counts: int) -> None:
    """Raise `ValueError` unless as many of each condition were given, or one."""
    if {*counts} - {1, max(counts)}:
        given = ", ".join(map(str, counts))
        raise ValueError(f"conditions: {given} rows were given: give one of each, or as many")
