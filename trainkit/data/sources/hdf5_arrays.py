"""Which arrays of an HDF5 file hold images, their pairs, labels, captions, vectors, and what the values mean."""

# N images, H/W height and width, C channels, K classes

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from trainkit.data.account import Account, Kind
from trainkit.data.sources.columns import Labels
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.metadata import ColumnOptions
from trainkit.data.sources.records import sorted_labels
from trainkit.data.sources.splits import ALL, DEFAULT, SPLIT_OF
from trainkit.data.sources.texts import NotAClass, class_name, decode_text
from trainkit.errors import UserError

STANDARD = {"images": ("data", "images"), "label": ("labels", "label"), "captions": ("texts", "captions", "text",
            "caption"), "vector": ("vectors", "vector"),
            "conditioning images": ("conditioning_images", "conditioning_image")}  # fmt: skip
OTHER_IMAGES = ("image", "imgs", "img", "x", "pixels")
OTHER_LABELS = ("y", "target", "targets", "class", "classes", "category", "cls")
OTHER_CAPTIONS = ("prompts", "prompt", "descriptions", "description")
CLASS_NAMES = ("class_names", "label_names", "list_classes", "classes", "categories", "names")
CHANNELS = (1, 3, 4)
LAYOUTS = {"NHWC": (0, 1, 2), "NCHW": (1, 2, 0)}  # how an image's axes become height, width, channels
ENCODED = "encoded"  # the bytes of an image file per row
SCANNED_ROWS = 2**20  # of labels, read at once


class Arrays(NamedTuple):
    """The paths of the arrays in the file. `layout`: of `LAYOUTS`, NHW, or `ENCODED`; `condition` is one of pairs."""

    image: str
    layout: str
    label: str | None
    text: str | None
    vector: str | None
    is_one_hot: bool = False
    condition: str | None = None
    condition_layout: str | None = None

    @property
    def identity(self) -> str:
        """What is read, as text; without conditioning images as it was before there were any."""
        values = [f"{name}={value!r}" for name, value in self._asdict().items()]
        return f"Arrays({', '.join(values if self.condition else values[:-2])})"


def find_arrays(file: Any, options: ReadOptions, account: Account, what: str) -> Arrays:
    """The arrays of an open file. What is not used, or has an unusual name, is added to `account`. Raises `UserError`.

    `what` names the file in errors.
    """
    arrays = _arrays_of_split(file, options.split, account, what)
    condition = _condition_array(arrays, options.columns, what)
    others = {path: array for path, array in arrays.items() if path != condition}
    image = _image_array(others or arrays, options.columns.image, what)
    condition = None if condition == image else condition  # there is no other image
    layout, count = _layout(image, arrays[image], what), len(arrays[image])
    condition, condition_layout = _checked_condition(arrays, condition, options.columns, count, what)
    label = _find(arrays, STANDARD["label"], OTHER_LABELS, (1, 2), count, what)
    wanted = options.columns.caption
    text = _find(arrays, (wanted,) if wanted else STANDARD["captions"], OTHER_CAPTIONS, (1, 2), count, what)
    if wanted and text != wanted:
        raise UserError(f"--caption_column {wanted}: {what} has no such array; it has {_shown(arrays)}")
    wanted = options.columns.vector
    vector = _find(arrays, tuple(dict.fromkeys([wanted, *STANDARD["vector"]])), (), (2,), count, what)
    if wanted != "vector" and vector != wanted:
        raise UserError(f"--vector_column {wanted}: {what} has no such array of (N, D)")
    found = {"images": image, "label": label, "captions": text, "vector": vector, "conditioning images": condition}
    told = options.columns.caption, options.columns.vector, options.columns.condition
    for meaning, path in found.items():
        if path is not None and path not in (*STANDARD[meaning], *told):
            account.add(Kind.COLUMN_ALIAS, f"{path} as {meaning}")
    is_one_hot = label is not None and arrays[label].ndim == 2 and arrays[label].shape[1] > 1
    if label is not None and is_one_hot and not _is_one_hot(arrays[label]):
        account.add(Kind.LABEL_NOT_A_CLASS, f"{label} {arrays[label].shape} holds several values per image")
        label = None
    for path in arrays:
        if path not in found.values() and not _holds_class_names(path, arrays, count):
            account.add(Kind.COLUMN_NOT_USED, path)
    is_one_hot = is_one_hot and label is not None
    return Arrays(image, layout, label, text, vector, is_one_hot, condition, condition_layout)


def read_labels(file: Any, arrays: Arrays, account: Account) -> Labels:
    """The classes of the label array. Whole numbers below 0 stand for no class."""
    if arrays.label is None:
        return Labels()
    array, count = file[arrays.label], len(file[arrays.image])
    names = _class_names(file, array, count)
    if names is None and arrays.is_one_hot:
        names = [str(number) for number in range(array.shape[1])]
    if names is not None:
        is_number = arrays.is_one_hot or array.dtype.kind in "iu"
        return Labels(names, {str(number) if is_number else name: number for number, name in enumerate(names)})
    found = set()
    for value, rows in _distinct(array):
        try:
            found.add(class_name(value))
        except NotAClass as error:
            account.add(Kind.LABEL_NOT_A_CLASS, f"{arrays.label}: {error}", rows)
    if array.dtype.kind in "iuf":
        found = {name for name in found if name is not None and int(name) >= 0}
    names = sorted_labels({name for name in found if name is not None}, account) or None
    return Labels(names, {name: number for number, name in enumerate(names or ())}, is_counted=True)


def scalar(value: Any) -> Any:
    """A value of an array as Python has it; bytes as text."""
    value = value.reshape(-1)[0] if isinstance(value, np.ndarray) else value
    value = value.item() if isinstance(value, np.generic) else value
    return decode_text(value)[0] if isinstance(value, bytes) else value


def _arrays_of_split(file: Any, wanted: str, account: Account, what: str) -> dict[str, Any]:
    """path -> array, of those that belong to the split. Names like x_train and groups like train/ are splits."""
    arrays: dict[str, Any] = {}
    file.visititems(lambda path, item: arrays.update({path: item}) if getattr(item, "shape", ()) else None)
    rows: dict[str, int] = {}
    for path, array in arrays.items():
        if (split := _split(path)) and (array.ndim > 2 or _is_encoded(array)):
            rows[split] = max(rows.get(split, 0), len(array))
    if not rows:
        if wanted not in (ALL, DEFAULT):
            raise UserError(f"--dataset_split {wanted} is not in {what}, which has no splits")
        return arrays
    if len(rows) == 1 and wanted in (ALL, DEFAULT):
        wanted = next(iter(rows))
    if wanted not in rows:
        raise UserError(f"--dataset_split {wanted} is not in {what}, which has {', '.join(rows)}: choose one of these")
    for split, count in rows.items():
        if split != wanted:
            account.add(Kind.OTHER_SPLIT_ROWS, f"{split} ({count:,})", count)
    return {path: array for path, array in arrays.items() if _split(path) in (None, wanted)}


def _words(path: str) -> list[str]:
    return [word for word in re.split(r"[/_\-. ]+", path.casefold()) if word]


def _split(path: str) -> str | None:
    return next((SPLIT_OF[word] for word in _words(path) if word in SPLIT_OF), None)


def _key(path: str) -> str:
    """The name of an array without the parts that name a split: train_set_x is x, test/images is images."""
    words = [word for word in _words(path.rpartition("/")[2]) if word not in SPLIT_OF and word != "set"]
    return "_".join(words)


def _image_array(arrays: dict[str, Any], wanted: str | None, what: str) -> str:
    if wanted is not None:
        if wanted not in arrays:
            raise UserError(f"--image_column {wanted} is not in {what}; it has {_shown(arrays)}")
        return wanted
    usable = {path: array for path, array in arrays.items() if _holds_images(array)}
    for names in (STANDARD["images"], OTHER_IMAGES):
        found = [path for name in names for path in arrays if _key(path) == name]
        found = [path for path in found if names == STANDARD["images"] or path in usable]
        if found:
            return found[0]
    found = [path for path, array in usable.items() if array.ndim == 4 or _is_encoded(array)]
    if len(found) != 1:
        raise UserError(
            f"{what} has no array `data` of (N, H, W, C) or (N, C, H, W); it has {_shown(arrays) or 'no array'}"
        )
    return found[0]


def _condition_array(arrays: dict[str, Any], columns: ColumnOptions, what: str) -> str | None:
    """The array that is told or named to hold conditioning images, wanted or not: it holds no images."""
    wanted = columns.condition if columns.has_pairs else None
    if wanted is None:
        named = (path for name in STANDARD["conditioning images"] for path in arrays if _key(path) == name)
        return next((path for path in named if path != columns.image and _holds_images(arrays[path])), None)
    if wanted not in arrays:
        raise UserError(f"--conditioning_image_column {wanted} is not in {what}; it has {_shown(arrays)}")
    return wanted


def _checked_condition(
    arrays: dict[str, Any], path: str | None, columns: ColumnOptions, count: int, what: str
) -> tuple[str | None, str | None]:
    """The array of conditioning images and its layout, if they are wanted. Raises `UserError` if there are too few."""
    if path is None or not columns.has_pairs:
        return None, None
    if len(arrays[path]) != count:
        raise UserError(f"{what}: `{path}` has {len(arrays[path])} rows for {count} images")
    return path, _layout(path, arrays[path], what)


def _shown(arrays: dict[str, Any]) -> str:
    return ", ".join(f"{path} {array.shape}" for path, array in list(arrays.items())[:10])


def _is_encoded(array: Any) -> bool:
    """Whether the rows are sequences of bytes, each of its own length."""
    metadata = array.dtype.metadata or {}
    return array.ndim == 1 and metadata.get("vlen") in (np.dtype("uint8"), np.uint8)


def _holds_images(array: Any) -> bool:
    return array.ndim in (3, 4) or _is_encoded(array)


def _layout(path: str, array: Any, what: str) -> str:
    """How the axes of the image array are to be read. Raises `UserError` where that is ambiguous."""
    if _is_encoded(array):
        return ENCODED
    shape, given = array.shape, array.attrs.get("layout")
    given = given.decode() if isinstance(given, bytes) else given
    fits = [layout for layout, axes in LAYOUTS.items() if len(shape) == 4 and shape[1 + axes[2]] in CHANNELS]
    if len(shape) == 3 and given is None:
        return "NHW"
    if given in fits:
        return given
    if len(fits) == 1 and given is None:
        return fits[0]
    if given is not None or not fits:
        raise UserError(f"{what}: `{path}` {shape} is not (N, H, W, C) or (N, C, H, W) of 1, 3 or 4")
    raise UserError(
        f"{what}: `{path}` {shape} may have its channels first or last; say which in h5py: "
        f"file['{path}'].attrs['layout'] = 'NHWC' (or 'NCHW')"
    )


def _find(
    arrays: dict[str, Any], names: tuple[str, ...], others: tuple[str, ...], dimensions: tuple, count: int, what: str
) -> str | None:
    """The array of one of the `names`, which must have `count` rows, else of the `others`, if it has."""
    for name in (*names, *others):
        for path, array in arrays.items():
            if name not in (path, _key(path)) or array.ndim not in dimensions:
                continue
            if len(array) == count:
                return path
            if name in names:
                raise UserError(f"{what}: `{path}` has {len(array)} rows for {count} images")
    return None


def _is_one_hot(array: Any) -> bool:
    """Whether each row has at most one 1, and zeros."""
    if array.dtype.kind not in "iufb":
        return False
    for start in range(0, len(array), SCANNED_ROWS):
        part = np.asarray(array[start : start + SCANNED_ROWS])
        if not (np.isin(part, (0, 1)).all() and (part.sum(axis=1) <= 1).all()):
            return False
    return True


def _class_names(file: Any, label: Any, count: int) -> list[str] | None:
    """The attribute `class_names` of the labels or the file, or an array of names next to labels that are numbers."""
    given = next((a.attrs["class_names"] for a in (label, file) if "class_names" in a.attrs), None)
    if given is None and (label.dtype.kind in "iu" or label.ndim == 2):
        arrays: dict[str, Any] = {}
        file.visititems(lambda path, item: arrays.update({path: item}) if getattr(item, "shape", ()) else None)
        path = next((path for path in arrays if _holds_class_names(path, arrays, count)), None)
        given = None if path is None else arrays[path][:]
        if given is not None and label.ndim == 1 and int(np.max(label[:], initial=0)) >= len(given):
            given = None  # numbers that do not count from 0
    return None if given is None else [str(scalar(name)) for name in given]


def _holds_class_names(path: str, arrays: dict[str, Any], count: int) -> bool:
    array = arrays[path]
    is_text = array.dtype.kind == "S" or (array.dtype.metadata or {}).get("vlen") in (str, bytes)
    return _key(path) in CLASS_NAMES and array.ndim == 1 and is_text and len(array) != count


def _distinct(array: Any) -> Iterator[tuple[Any, int]]:
    counts: Counter = Counter()
    for start in range(0, len(array), SCANNED_ROWS):
        values, numbers = np.unique(array[start : start + SCANNED_ROWS], return_counts=True)
        for value, number in zip(values, numbers, strict=True):
            counts[scalar(value)] += int(number)
    yield from counts.items()
