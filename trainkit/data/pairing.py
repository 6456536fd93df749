"""Pairs of an image and a conditioning image: how they are stored, and which flags agree with them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from trainkit.data.settings import CHANNELS, LOSSY_STORAGES, PreparationSettings
from trainkit.errors import UserError
from trainkit.options.data import PairOptions
from trainkit.options.model import DERIVED_KINDS, ConditioningOptions

LEFT_OUT = "none"  # instead of a column
NEEDS_PAIRS = f"--condition image needs --condition_from: {', '.join(DERIVED_KINDS)}; or conditioning images"
PAIR_FLAGS = tuple(field.name for field in dataclasses.fields(PairOptions))
GIVE_PAIRS = (
    "--conditioning_data_dir FOLDER, a conditioning_image column of a table, conditioning_file_name in metadata, or "
    "NAME.cond.png in a WebDataset archive"
)


@dataclass(frozen=True)
class PairSettings:
    """How conditioning images are stored: pictures of `mode`, or label maps with ids from 0 to `classes` - 1."""

    mode: str = "RGB"  # L, RGB or RGBA
    classes: int | None = None  # of label maps, whose mode is L

    @property
    def channels(self) -> int:
        return CHANNELS[self.mode]

    def image_settings(self, settings: PreparationSettings) -> PreparationSettings:
        """The settings of a conditioning image whose image has `settings`; label maps are stored without loss."""
        storage = settings.storage
        if self.classes is not None and storage != "pixels":
            storage = "png"
        return dataclasses.replace(
            settings,
            image_mode=self.mode,
            bit_depth=8 if self.classes is not None else settings.bit_depth,
            storage=storage,
            storage_quality=settings.storage_quality if storage in LOSSY_STORAGES else 100,
            min_size=0,
            max_aspect_ratio=0.0,
        )

    def __str__(self) -> str:
        return f"{self.mode} pictures" if self.classes is None else f"label maps of {self.classes} classes"


def describe_pairs(pairs: PairSettings | None) -> str:
    return "no conditioning images" if pairs is None else f"{pairs} as conditioning images"


def pairs_of(preparation: dict) -> PairSettings | None:
    """The pairs that a preparation.json describes; None for a dataset without."""
    return PairSettings(**preparation["pairs"]) if "pairs" in preparation else None


def pairs_from_options(options: Any) -> PairSettings | None:
    """How pairs would be stored; None where the script, or its condition, uses none. Raises `UserError`."""
    if not wants_pairs(options):
        return None
    mode, classes = options.conditioning_image_mode, options.conditioning_classes
    if classes is not None and mode is not None:
        raise UserError(
            f"--conditioning_image_mode {mode} is for pictures, --conditioning_classes {classes} for label maps: "
            "leave one of them out"
        )
    folder, column = options.conditioning_data_dir, options.conditioning_image_column
    if folder is not None and column is not None:
        raise UserError(
            f"--conditioning_data_dir {folder} and --conditioning_image_column {column} both name the conditioning "
            "images: leave one of them out"
        )
    if column is not None and column == options.image_column:
        raise UserError(f"--conditioning_image_column {column} and --image_column {column} name the same column")
    if mode == "RGBA" and options.storage == "jpeg":
        raise UserError("--storage jpeg stores no transparency; give --storage png or webp, or another "
                        "--conditioning_image_mode than RGBA")  # fmt: skip
    return PairSettings(mode or "RGB") if classes is None else PairSettings("L", classes)


def wants_pairs(options: Any) -> bool:
    """Whether conditioning images are read where the data has them."""
    if _is_conditional(options):
        return "image" in options.condition and options.condition_from is None
    return isinstance(options, PairOptions) and options.conditioning_image_column != LEFT_OUT


def _is_conditional(options: Any) -> bool:
    """Whether these are the options of train_conditional.py, whose class would cost each worker 0.1 s of imports."""
    return isinstance(options, ConditioningOptions)


def check_pairs_found(found: PairSettings | None, options: Any, what: str) -> None:
    """Raise `UserError` if the source `what` has no pairs and the options need them."""
    if found is not None or not wants_pairs(options):
        return
    if _is_conditional(options):
        raise _no_pairs(what)
    for name in PAIR_FLAGS:
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name} {getattr(options, name)} is for conditioning images, and {what} has none: give {GIVE_PAIRS}"
            )


def check_prepared_pairs(held: PairSettings | None, options: Any, what: str) -> bool:
    """Return whether a prepared dataset has pairs that are not used. Raises `UserError` if the options disagree."""
    for name in ("conditioning_data_dir", "conditioning_image_column"):
        if (given := getattr(options, name, None)) is not None:
            has = "without conditioning images: prepare the raw images again with this flag"
            if held is not None:
                has = "with its conditioning images: leave the flag out"
            raise UserError(f"--{name} {given}, but {what} is prepared already, {has}")
    if not _is_conditional(options) or "image" not in options.condition:
        return held is not None
    if options.condition_from is not None:
        if held is not None:
            raise UserError(
                f"--condition_from {options.condition_from}, but {what} has conditioning images: leave the flag out, "
                "or prepare the images without them"
            )
        return False
    if held is None:
        raise _no_pairs(what)
    if (flag := flag_against(held, options)) is not None:
        raise UserError(f"{flag}, but {what} holds {held}: leave the flag out, or prepare the images again")
    return False


def flag_against(pairs: PairSettings, options: PairOptions) -> str | None:
    """The flag of `options` that asks for another kind of conditioning images than `pairs`, with its value."""
    classes, mode = options.conditioning_classes, options.conditioning_image_mode
    if classes not in (None, pairs.classes):
        return f"--conditioning_classes {classes}"
    if mode is not None and (pairs.classes is not None or mode != pairs.mode):
        return f"--conditioning_image_mode {mode}"
    return None


def _no_pairs(what: str) -> UserError:
    return UserError(f"{NEEDS_PAIRS}, of which {what} has none: {GIVE_PAIRS}")
