"""Open a prepared dataset; other images are prepared once into the cache, and found there by fingerprint."""

import os
import re
from pathlib import Path

from filelock import FileLock

from trainkit.data.files import RemotePath, cache_root, exists, fetch, for_each, location, sizes
from trainkit.data.format import INFO_NAME, LOCK_NAME, PREPARATION_NAME, STATE_NAME, format_counts, read_preparation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import check_prepared_pairs, describe_pairs
from trainkit.data.preparation.pool import run_jobs_in_processes
from trainkit.data.preparation.prepare import dataset_fingerprint, prepare
from trainkit.data.settings import (
    check_training_size,
    parse_resolution,
    resize_mode_from_options,
    settings_from_options,
)
from trainkit.data.sources.opening import open_source
from trainkit.data.trial import TRIAL_FILES, TrialImages, try_source
from trainkit.errors import UserError
from trainkit.terminal import counted, say


def open_or_prepare(options) -> PreparedImages:
    """Open the images of `--train_data_dir` or `--dataset_name` (`SourceOptions`, `ImageOptions`, `LoadingOptions`).

    Other images than a prepared dataset are first prepared in the cache, if they are not there already. All processes
    of a run may call this at the same time: one prepares, and the others wait. Raises `UserError`.
    """
    flag = "--train_data_dir" if options.dataset_name is None else "--dataset_name"
    given = options.train_data_dir if options.dataset_name is None else options.dataset_name
    place = given and location(given, options.storage_options)
    if options.streaming:
        _check_streaming(options, place, f"{flag} {given}")
    if place and exists(place / PREPARATION_NAME):
        resolution = None if options.resolution is None else parse_resolution(options.resolution)
        if isinstance(place, RemotePath) and not options.streaming:
            place = local_copy(place, cache_root(options.cache_dir) / "copies")
        images = PreparedImages(place, resolution)
        _check_agreement(images, options, f"{flag} {given}")
        if check_prepared_pairs(images.pairs, options, f"{flag} {given}"):
            say(f"{given} has {describe_pairs(images.pairs)}, which are not used (--condition image uses them)")
        return _few_to_encode(images, options)
    if place and exists(place / LOCK_NAME):
        raise UserError(f"{flag} {given} is an unfinished prepared dataset; run its prepare_dataset.py again")
    settings = settings_from_options(options)
    source = open_source(options)
    fingerprint = dataset_fingerprint(source, settings)
    root, name = cache_root(options.cache_dir) / "prepared", re.sub(r"[^A-Za-z0-9_-]+", "-", source.name)[:60]
    folder = next(root.glob(f"*-{fingerprint}"), root / f"{name}-{fingerprint}")  # a source may have been renamed
    resolution = None
    if settings.train_height is not None and settings.train_width is not None:
        resolution = settings.train_height, settings.train_width
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        images = PreparedImages(folder, resolution)
    except UserError:  # missing, or damaged
        if getattr(options, "dry_run", False):
            return try_source(source, settings, resolution)
        if is_first:
            say(f"preparing {len(source):,} files of {given} into {folder} (once; later runs use it)")
        prepare(source, settings, folder, options.num_proc, is_first, "--cache_dir", run_jobs_in_processes)
        images = PreparedImages(folder, resolution)
    say(f"prepared images: {folder}, {format_counts(images.preparation)}")
    return _few_to_encode(images, options)


def is_prepared(options) -> bool:
    """Whether `--train_data_dir` or `--dataset_name` is a prepared dataset."""
    given = options.dataset_name or options.train_data_dir
    return given is not None and exists(location(given, options.storage_options) / PREPARATION_NAME)


def _few_to_encode(images: PreparedImages, options) -> PreparedImages:
    """All `images`; the first few in a dry run that would encode their captions or the images themselves."""
    encodes = getattr(options, "vae_name_or_path", None) or "text" in (getattr(options, "condition", None) or ())
    if not getattr(options, "dry_run", False) or not encodes:
        return images
    return TrialImages(images.folder, (images.height, images.width), TRIAL_FILES, len(images))


def _check_streaming(options, place: Path | RemotePath | None, what: str) -> None:
    if not isinstance(place, RemotePath):
        raise UserError(f"--streaming reads a prepared dataset from a URL, and {what} is not one: leave it out")
    if not exists(place / PREPARATION_NAME):
        raise UserError(
            f"--streaming: {what} is not a prepared dataset; make one with prepare_dataset.py --output_dir URL"
        )
    if options.shuffle_block_size == 0:
        raise UserError(
            "--streaming fetches whole shards: add --shuffle_block_size 1024, so that each is used once it is read"
        )


def local_copy(folder: RemotePath, root: Path) -> Path:
    """Copy a prepared dataset at a URL into `root`, unless it is there; files that a killed run copied are kept.

    Returns the copy. Raises `UserError` if it cannot be read or written.
    """
    preparation = read_preparation(folder)
    if preparation is None:
        raise UserError(
            f"{folder} is not a complete prepared dataset; run prepare_dataset.py with that --output_dir again"
        )
    copy = root / f"{folder.name[:60]}-{preparation['fingerprint']}"
    if read_preparation(copy) is not None:  # another user's copy may be read-only
        return copy
    names = [shard["filename"] for shard in preparation["shards"]]
    wanted = {shard["filename"]: shard["num_bytes"] for shard in preparation["shards"]}
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with FileLock(copy / LOCK_NAME):
            if read_preparation(copy) is not None:
                return copy
            present = sizes(copy)
            missing = [name for name in names if present.get(name) != wanted[name]]
            shards = counted(len(missing), "shard")
            say(f"copying {shards} of {folder} to {copy} (once; --streaming reads without a copy)")
            list(for_each(lambda path: fetch(path, copy / path.name), [folder / name for name in missing]))
            for name in (INFO_NAME, STATE_NAME, PREPARATION_NAME):
                fetch(folder / name, copy / name)
    except OSError as error:
        raise UserError(f"copying {folder} to --cache_dir {copy}: {error.strerror or error}") from None
    return copy


def _check_agreement(images: PreparedImages, options, what: str) -> None:
    """Raise `UserError` if the options differ from the settings of the prepared dataset."""
    stored = images.stored_height, images.stored_width
    held = f"{stored[0]}x{stored[1]}"
    if images.settings.train_height is not None:
        check_training_size((images.height, images.width), stored)
    elif (images.height, images.width) != stored:
        raise UserError(f"--resolution {options.resolution}, but {what} was prepared at {held}: leave the flag out")
    if options.stored_resolution is not None:
        if parse_resolution(options.stored_resolution, "--stored_resolution") != stored:
            raise UserError(f"--stored_resolution {options.stored_resolution}, but {what} holds {held}: leave it out")
    resize_mode = resize_mode_from_options(options)
    if resize_mode not in (None, images.settings.resize_mode):
        raise UserError(
            f"--resize_mode {resize_mode} (--center_crop is crop), but {what} was prepared with "
            f"{images.settings.resize_mode}: leave the flag out, or prepare the images again"
        )
    if options.image_mode not in (None, images.image_mode):
        raise UserError(
            f"--image_mode {options.image_mode}, but {what} holds {images.image_mode}: leave the flag out, or prepare "
            "the images again"
        )
    if options.preserve_input_precision and images.bit_depth == 8:
        raise UserError(f"--preserve_input_precision, but {what} was prepared with 8 bits: prepare the images again")
