"""A vector of an image: an embedding or measurements that a model is to be conditioned on, as float32."""

import io
import json
from typing import Any

import numpy as np

from trainkit.data import faults
from trainkit.data.faults import RejectedImage

MAX_VECTOR_BYTES = 16 * 2**20


def vector_bytes(value: Any) -> bytes | None:
    """A list of numbers (or its JSON) as float32 bytes; None for no vector, b"" for what is none (to be rejected)."""
    if value is None or value == "":
        return None
    try:
        array = np.asarray(json.loads(value) if isinstance(value, str) else value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        return b""
    return array.tobytes() if array.ndim == 1 else b""


def parse_npy(content: bytes) -> np.ndarray:
    """The vector (D,) float32 in the bytes of a .npy file. Raises `RejectedImage`: bad_vector."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except Exception as error:  # numpy parses the header as Python, and raises almost anything
        raise RejectedImage(faults.BAD_VECTOR, f"no .npy file: {' '.join(str(error).split())[:200]}") from None
    if len(shape) != 1 or dtype.kind not in "fiu":
        raise RejectedImage(
            faults.BAD_VECTOR, f"an array of shape {shape} and type {dtype}, wanted one row of numbers"
        )
    if len(content) - file.tell() != shape[0] * dtype.itemsize:  # never allocates what a header only claims
        raise RejectedImage(faults.BAD_VECTOR, f"the .npy file does not hold the {shape[0]} numbers that it declares")
    return np.frombuffer(content, dtype, offset=file.tell()).astype(np.float32)


def check_vector(vector: np.ndarray | None, length: int) -> np.ndarray:
    """`vector` (length,) as it was. Raises `RejectedImage`: bad_vector."""
    if vector is None:
        raise RejectedImage(faults.BAD_VECTOR, f"it has no vector; others have one of {length} numbers")
    if not vector.size:
        raise RejectedImage(faults.BAD_VECTOR, "its vector is not a row of numbers")
    if vector.shape != (length,):
        raise RejectedImage(faults.BAD_VECTOR, f"its vector has {vector.size} numbers; the first one has {length}")
    if not np.isfinite(vector).all():
        raise RejectedImage(faults.BAD_VECTOR, "its vector holds a number that is not finite")
    return vector


def as_vector(value: Any) -> np.ndarray | None:
    """A row's value, list or array, as float32; of length 0 if it is not a row of numbers."""
    content = vector_bytes(value)
    return None if content is None else np.frombuffer(content, np.float32)
