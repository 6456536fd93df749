"""Which columns of a table hold images, labels, captions and vectors, and what the values in them mean.

Parquet files and datasets of the Hub share these rules. The types that `datasets` stored in the schema come first
(Image, ClassLabel), then the names of the columns.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from trainkit.data.account import Account, Kind
from trainkit.data.format import CONDITION_COLUMN, NO_LABEL
from trainkit.data.sources.metadata import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LABEL_COLUMNS,
    OTHER_CAPTION_COLUMNS,
    ColumnOptions,
    find_columns,
    normal_name,
)
from trainkit.data.sources.records import Record, sorted_labels
from trainkit.data.sources.texts import NotAClass, caption_text, class_name
from trainkit.data.sources.vectors import as_vector
from trainkit.errors import UserError

IMAGE_COLUMNS = (
    "image", "img", "images", "picture", "photo", "pixel_values", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes",
)  # fmt: skip
LABEL_NAMES = (*LABEL_COLUMNS, "labels")
MAX_SHOWN_COLUMNS = 20


class Columns(NamedTuple):
    """Which columns of a table hold what."""

    image: str
    label: str | None = None
    text: str | None = None
    vector: str | None = None
    condition: str | None = None  # conditioning images

    @property
    def identity(self) -> tuple:
        """The columns that are read; without conditioning images as it was before there were any."""
        return tuple(self) if self.condition else tuple(self)[:-1]


class Labels(NamedTuple):
    """The classes of a label column.

    `numbers`: class by its name, for whole numbers by their digits. `is_counted`: values that are not a class are in
    the account already.
    """

    names: list[str] | None = None
    numbers: dict[str, int] | None = None
    is_counted: bool = False

    def number(self, value: Any) -> tuple[int, bool]:
        """The class of a value, `NO_LABEL` for none; and whether the value is a class or a gap, as it should be."""
        if self.numbers is None:
            return NO_LABEL, True
        if isinstance(value, str) and value in self.numbers:
            return self.numbers[value], True
        try:
            name = class_name(value)
        except NotAClass:
            return NO_LABEL, False
        number = NO_LABEL if name is None else self.numbers.get(name, NO_LABEL)
        return number, name in self.numbers or name in (None, "-1")


def find_table_columns(schema: pa.Schema, options: ColumnOptions, account: Account, where: str, what: str) -> Columns:
    """The columns of a table by their meaning. What is not used, or has an unusual name, is added to `account`.

    `where` names the table in the account, `what` in errors. Raises `UserError`: no image column, or the one that a
    flag names is not there.
    """
    features = table_features(schema)
    condition = _condition_column(schema, options, what)
    images = _image_columns(schema, features, options, what)
    if images == [condition]:  # there is no other image
        condition = None
    images = [name for name in images if name != condition]
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    classes = sorted((name for name in classes if name in schema.names), key=lambda name: _rank(name, LABEL_NAMES))
    named = [name for name in schema.names if normal_name(name) in LABEL_NAMES]
    label = next(iter(classes or sorted(named, key=lambda name: _rank(name, LABEL_NAMES))), None)
    texts = [name for name in schema.names if _is_caption(schema.field(name).type) and name not in (label, images[0])]
    text = next(iter(find_columns(texts, ColumnOptions("", options.caption), Account(), where).captions), None)
    has_vectors = options.vector in schema.names and _is_vector(schema.field(options.vector).type)
    vector = options.vector if has_vectors else None
    if vector is None and options.vector != "vector":
        raise UserError(f"--vector_column {options.vector} is not a column of lists of numbers in {what}")
    columns = Columns(images[0], label, text, vector, condition)
    _count_columns(schema, columns, options, images, account, where)
    if label is not None and pa.types.is_nested(schema.field(label).type):
        account.add(Kind.LABEL_NOT_A_CLASS, f"{label} of {where} holds {schema.field(label).type}")
        columns = columns._replace(label=None)
    return columns


def _image_columns(schema: pa.Schema, features: dict, options: ColumnOptions, what: str) -> list[str]:
    """The columns that may hold the images, best first."""
    if options.image is not None:
        if options.image not in schema.names:
            raise UserError(f"--image_column {options.image} is not in {what}; it has {_shown(schema)}")
        return [options.image]
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    contents = [name for name in schema.names if _is_image(schema.field(name).type)]
    order = [*IMAGE_COLUMNS, *FILE_COLUMNS]
    paths = [name for name in schema.names if normal_name(name) in order and is_string(schema.field(name).type)]
    for found in (typed, contents, paths):
        if found:
            return sorted(found, key=lambda name: _rank(name, order))
    raise UserError(f"{what} has no image column (bytes, or paths named file_name or image); it has {_shown(schema)}")


def _condition_column(schema: pa.Schema, options: ColumnOptions, what: str) -> str | None:
    """The column of conditioning images, if there is one and it is wanted. Raises `UserError`."""
    if not options.has_pairs:
        return None
    by_name = {normal_name(name): name for name in reversed(schema.names)}
    found = [options.condition] if options.condition in schema.names else []
    if options.condition is None and by_name.get(CONDITION_COLUMN, options.image) != options.image:
        found = [by_name[CONDITION_COLUMN]]
    if options.condition is not None and not found:
        raise UserError(f"--conditioning_image_column {options.condition} is not in {what}; it has {_shown(schema)}")
    kinds = [schema.field(name).type for name in found]
    if kinds and not _is_image(kinds[0]) and not is_string(kinds[0]):
        if options.condition is None:
            return None
        raise UserError(f"--conditioning_image_column {options.condition} holds {kinds[0]}, not images or paths")
    return found[0] if found else None


def _count_columns(
    schema: pa.Schema, columns: Columns, options: ColumnOptions, images: list[str], account: Account, where: str
) -> None:
    texts = [name for name in schema.names if OTHER_CAPTION_COLUMNS.fullmatch(normal_name(name))]
    for name in schema.names:
        if name in columns:
            continue
        hint = ""
        if name in images:
            hint = f" (images are read from {columns.image}; or --image_column {name})"
        elif columns.text is None and name in texts:
            hint = f" (for captions: --caption_column {name})"
        account.add(Kind.COLUMN_NOT_USED, f"{name} of {where}{hint}")
    for name, known, meaning in (
        (columns.image, (*IMAGE_COLUMNS, options.image), "images"),
        (columns.label, ("label",), "label"),
        (columns.text, (*CAPTION_COLUMNS, options.caption), "captions"),
    ):
        if name is not None and name not in known:
            account.add(Kind.COLUMN_ALIAS, f"{name} as {meaning} in {where}")


def class_labels(
    schema: pa.Schema, column: str | None, values: Iterable[pa.ChunkedArray | pa.Array], account: Account, where: str
) -> Labels:
    """The classes of a label column: those that `datasets` stored with it, else the distinct values, sorted.

    `values`: the column in parts, read only in the second case.
    """
    if column is None:
        return Labels()
    names = (table_features(schema).get(column) or {}).get("names")
    if names is not None:
        numbers = {str(number): number for number in range(len(names))}
        if is_string(schema.field(column).type):
            numbers |= {name: number for number, name in enumerate(names)}
        return Labels(list(names), numbers)
    found = set()
    for value, count in _counts(values):
        try:
            found.add(class_name(value))
        except NotAClass as error:
            account.add(Kind.LABEL_NOT_A_CLASS, f"{column} of {where}: {error}", count)
    names = sorted_labels({name for name in found if name is not None}, account) or None
    return Labels(names, {name: number for number, name in enumerate(names or ())}, is_counted=True)


def _counts(values: Iterable[pa.ChunkedArray | pa.Array]) -> Iterator[tuple[Any, int]]:
    """The distinct values of each part, and how often it holds them."""
    for part in values:
        if pa.types.is_string_view(part.type) or pa.types.is_binary_view(part.type):
            part = part.cast(pa.large_binary())  # some versions of pyarrow find "" for nulls in views
        elif pa.types.is_dictionary(part.type):
            part = part.cast(part.type.value_type)
        for entry in part.value_counts():
            yield entry["values"].as_py(), entry["counts"].as_py()


def read_row(columns: Columns, labels: Labels, row: tuple[Any, ...]) -> Record:
    """The record of a row, whose values are in the order of `columns`. Images are bytes, or the path as it is stored.

    A struct of bytes and path gives its bytes if it has them.
    """
    image, label, text, vector, condition = row
    image, condition = _content(image), _content(condition)
    number, is_class = labels.number(label)
    caption = caption_text(text)
    notes = () if is_class or labels.is_counted else (Kind.LABEL_NOT_A_CLASS,)
    if columns.text is not None and not (caption or "").strip():
        notes, caption = (*notes, Kind.EMPTY_CAPTION), None
    return Record(image, number, caption, as_vector(vector), notes, condition)


def _content(image: Any) -> Any:
    """The bytes of an image, or its path."""
    if not isinstance(image, dict):
        return image
    content = image.get("bytes")
    return image.get("path") if content is None else content


def table_features(schema: pa.Schema) -> dict[str, dict]:
    """The features that `datasets` stored in a schema, by column; empty without any."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def holds_paths(kind: pa.DataType) -> bool:
    """Whether a column of images holds only their paths: strings, or structs of no bytes and a path."""
    if pa.types.is_struct(kind) and {"bytes", "path"} <= set(kind.names):
        return pa.types.is_null(kind.field("bytes").type) and is_string(kind.field("path").type)
    return is_string(kind)


def _rank(name: str, order: list[str] | tuple[str, ...]) -> int:
    return order.index(normal_name(name)) if normal_name(name) in order else len(order)


def _shown(schema: pa.Schema) -> str:
    more = ", ..." if len(schema.names) > MAX_SHOWN_COLUMNS else ""
    return ", ".join(schema.names[:MAX_SHOWN_COLUMNS]) + more


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        return _is_image(kind.field("bytes").type) or holds_paths(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_caption(kind: pa.DataType) -> bool:
    return is_string(kind) or (_is_list(kind) and is_string(kind.value_type))


def _is_vector(kind: pa.DataType) -> bool:
    return _is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
