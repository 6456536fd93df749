"""Raw images in, prepared images out: prepared once into the cache, found there by fingerprint ever after."""

import os
import re
from pathlib import Path

from filelock import FileLock

from trainkit.data.files import RemotePath, cache_root, exists, fetch, for_each, location, sizes
from trainkit.data.format import INFO_NAME, LOCK_NAME, PREPARATION_NAME, STATE_NAME, format_counts, read_preparation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.pool import run_jobs_in_processes
from trainkit.data.preparation.prepare import dataset_fingerprint, prepare
from trainkit.data.settings import (
    check_training_size,
    parse_resolution,
    resize_mode_from_options,
    settings_from_options,
)
from trainkit.data.sources.opening import open_source
from trainkit.errors import UserError


def open_or_prepare(options) -> PreparedImages:
    """Open what `--train_data_dir` or `--dataset_name` names (`SourceOptions`, `ImageOptions`, `LoadingOptions`).

    A prepared dataset is opened as it is. Anything else is prepared in the cache first, unless it is there already;
    every process of a run may call this at once: one prepares, the others wait for it. Raises `UserError`.
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
        return images
    if place and exists(place / LOCK_NAME):
        raise UserError(f"{flag} {given} is an unfinished prepared dataset; run its prepare_dataset.py again")
    settings = settings_from_options(options)
    source = open_source(options)
    fingerprint = dataset_fingerprint(source, settings)
    root, name = cache_root(options.cache_dir) / "prepared", re.sub(r"[^A-Za-z0-9_-]+", "-", source.name)[:60]
    folder = next(root.glob(f"*-{fingerprint}"), root / f"{name}-{fingerprint}")  # a source may have been renamed
    resolution = None if settings.train_height is None else (settings.train_height, settings.train_width)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        images = PreparedImages(folder, resolution)
    except UserError:  # not there, or damaged
        if is_first:
            print(f"preparing {len(source):,} files of {given} into {folder} (once; found there from then on)")
        prepare(source, settings, folder, options.num_proc, is_first, "--cache_dir", run_jobs_in_processes)
        images = PreparedImages(folder, resolution)
    if is_first:
        print(f"prepared images: {folder}, {format_counts(images.preparation)}", flush=True)
    return images


def _check_streaming(options, place: Path | RemotePath | None, what: str) -> None:
    if not isinstance(place, RemotePath):
        raise UserError(f"--streaming reads a prepared dataset from a URL, and {what} is none: leave it out")
    if not exists(place / PREPARATION_NAME):
        raise UserError(
            f"--streaming: {what} is no prepared dataset; make one with prepare_dataset.py --output_dir URL"
        )
    if options.shuffle_block_size == 0:
        raise UserError(
            "--streaming fetches whole shards: add --shuffle_block_size 1024, so that each is used at once"
        )


def local_copy(folder: RemotePath, root: Path) -> Path:
    """A copy of a prepared dataset at a URL in `root`, made once; what a killed run has copied is not copied again.

    Raises `UserError` where it cannot be read or written.
    """
    preparation = read_preparation(folder)
    if preparation is None:
        raise UserError(
            f"{folder} is no complete prepared dataset; run prepare_dataset.py with that --output_dir again"
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
            print(
                f"copying {len(missing):,} shards of {folder} to {copy} (once; --streaming makes no copy)", flush=True
            )
            list(for_each(lambda path: fetch(path, copy / path.name), [folder / name for name in missing]))
            for name in (INFO_NAME, STATE_NAME, PREPARATION_NAME):
                fetch(folder / name, copy / name)
    except OSError as error:
        raise UserError(f"copying {folder} to --cache_dir {copy}: {error.strerror or error}") from None
    return copy


def _check_agreement(images: PreparedImages, options, what: str) -> None:
    """What was asked for against what was prepared."""
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
