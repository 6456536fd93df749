"""Export a prepared dataset to one HDF5 file with one image per chunk, which `--train_data_dir` also accepts."""

# N images, H/W height and width, C channels

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.loading.conditioning_images import ConditioningImages
from trainkit.data.loading.dataset import PreparedImages
from trainkit.errors import UserError
from trainkit.packages import load_package

BATCH_BYTES = 16 * 2**20  # of pixels, copied at a time


def export_hdf5(images: PreparedImages, path: str | Path, compression: str = "none") -> None:
    """Write `data` (N, H, W, C), and `conditioning_images`, `labels`, `texts` and `vectors` if there are any.

    All are in the order of the dataset.
    Does nothing if the file holds exactly that. Raises `UserError` naming the flag.
    """
    path = Path(path)
    check_export(path)
    if not images.fixed_size:
        raise UserError(f"--export_hdf5 {path} needs images of one size: prepare them again with --center_crop")
    h5py = load_package("h5py", "--export_hdf5")
    mark = f"{images.fingerprint} {compression}" + (" pairs" if images.pairs is not None else "")
    if _held(h5py, path) == mark:
        print(f"{path} is up to date")
        return
    temporary = path.with_name(f"{path.name}.tmp")  # a fixed name: the file of a killed run is overwritten
    with _write_errors(path):
        try:
            with h5py.File(temporary, "w") as file:
                _write(h5py, file, images, compression)
                file.attrs["fingerprint"] = mark
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    what = "images" if images.pairs is None else "pairs"
    print(f"{path}: {len(images):,} {what}, {path.stat().st_size / 1e6:,.1f} MB", flush=True)


def check_export(path: Path) -> None:
    """Raise `UserError` if the file cannot be written, or exists and was not written by an export."""
    h5py = load_package("h5py", "--export_hdf5")
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise UserError(f"--export_hdf5 {path} must end in .h5 or .hdf5")
    if path.exists() and _held(h5py, path) is None:
        raise UserError(f"--export_hdf5 {path} exists and was not written by an export; give another name")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(
            f"--export_hdf5 {path}: its folder does not exist or cannot be written; create it, or give another"
        )


def _held(h5py: Any, path: Path) -> str | None:
    """Return the mark that an export wrote; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        with h5py.File(path, "r", locking=False) as file:
            return file.attrs.get("fingerprint")
    except (OSError, RuntimeError):
        return None


def _write(h5py: Any, file: Any, images: PreparedImages, compression: str) -> None:
    count, conditions = len(images), None if images.pairs is None else ConditioningImages(images)

    def create(name: str, channels: int, dtype: Any) -> Any:
        shape = images.stored_height, images.stored_width, channels
        packed = {} if compression == "none" else {"compression": compression}
        array = file.create_dataset(name, (count, *shape), dtype, chunks=(1, *shape), **packed)
        array.attrs["layout"] = "NHWC"
        return array

    data = create("data", images.channels, images.settings.dtype)
    labels = texts = vectors = pairs = None
    if conditions is not None:
        pairs = create("conditioning_images", conditions.pairs.channels, conditions.settings.dtype)
    if images.label_names is not None:
        labels = file.create_dataset("labels", (count,), "int64")
        words = h5py.string_dtype()
        file.attrs.create("class_names", np.array(images.label_names, dtype=object), dtype=words)
    if images.has_text:
        texts = file.create_dataset("texts", (count,), h5py.string_dtype())
    if images.vector_length:
        vectors = file.create_dataset("vectors", (count, images.vector_length), "float32")
    step = max(1, BATCH_BYTES // data.dtype.itemsize // int(np.prod(data.shape[1:])))
    for start in range(0, count, step):
        indices = np.arange(start, min(start + step, count))
        rows = slice(start, start + len(indices))
        data[rows] = images.gather(indices)
        if conditions is not None and pairs is not None:
            pairs[rows] = conditions.gather(indices)
        if labels is not None:
            labels[rows] = images.labels(indices)
        if texts is not None:
            texts[rows] = images.texts(indices)
        if vectors is not None:
            vectors[rows] = images.vectors(indices)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 raises either for a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"--export_hdf5 {path} cannot be written ({reason}); free space there or give another file"
        ) from None
