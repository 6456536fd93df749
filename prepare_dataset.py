"""Turn images (a folder, archives, Parquet, HDF5, a URL, a Hub dataset) into an Arrow dataset that opens instantly.

    python prepare_dataset.py --train_data_dir photos --resolution 64 --center_crop --output_dir photos-64
    python prepare_dataset.py --inspect photos-64
    python train_unconditional.py --train_data_dir photos-64 --output_dir model

    python prepare_dataset.py --train_data_dir photos-64 --export_hdf5 photos-64.h5

Run the same command again after an interruption or after files were added: only the missing part is done.
The training scripts also accept raw images and prepare them in the cache. See docs/data.md.
"""

import inspect
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from trainkit.errors import UserError, run_script
from trainkit.options.data import ImageOptions, PairOptions, SourceOptions
from trainkit.options.fields import option
from trainkit.options.hub import HubDatasetOptions
from trainkit.options.parsing import parse_options
from trainkit.options.terminal import TerminalOptions
from trainkit.terminal import say


@dataclass
class OutputOptions:
    """output: where the prepared dataset is written"""

    output_dir: str | None = option(
        None,
        "folder for the prepared dataset, a new or empty one, or an fsspec URL such as s3://bucket/set (required)",
    )
    engine: str = option(
        "processes",
        "where images are decoded: processes on this machine, or a Ray cluster",
        choices=("processes", "ray"),
    )
    ray_address: str | None = option(
        None, "with --engine ray: HOST:PORT of the cluster, or auto; default: a new cluster on this machine"
    )
    export_hdf5: str | None = option(
        None, "FILE.h5 to write the prepared dataset to as well (--train_data_dir may be one that is prepared)"
    )
    hdf5_compression: str = option(
        "none",
        "how --export_hdf5 compresses each image: gzip is smallest, none is fastest",
        choices=("none", "lzf", "gzip"),
    )
    overwrite_output_dir: bool = option(False, "replace a dataset of other images or other settings in --output_dir")
    contact_sheet: bool = option(True, "write contact_sheet.html: samples of each class, duplicates, rejected files")
    push_to_hub: bool = option(False, "push the prepared dataset with a card to the Hub")
    inspect: str | None = option(None, "print what is in this prepared dataset, and do nothing else")


@dataclass
class FilterOptions:
    """filtering: which images are kept, and for which split"""

    deduplicate: str = option(
        "none", "drop images that repeat an earlier one: exact compares prepared pixels, near also their looks",
        choices=("none", "exact", "near"),
    )  # fmt: skip
    near_distance: int = option(
        4, "with --deduplicate near: bits of the 64 of two perceptual hashes that may differ", within="[0, 16]"
    )
    validation_fraction: float = option(
        0.0,
        "fraction of the images, by a hash of their pixels, that goes to --output_dir/validation instead",
        within="[0, 1)",
    )
    max_rejected_fraction: float = option(
        0.9,
        "fraction of the files that may be unreadable: with more (after the first 1,000) the run stops; 1: never",
        within="[0, 1]",
    )


@dataclass
class Options(
    SourceOptions, PairOptions, ImageOptions, FilterOptions, OutputOptions, HubDatasetOptions, TerminalOptions
):
    pass


def main() -> None:
    options = parse_options(Options, __doc__.partition("\n")[0])
    if options.inspect is not None:
        from trainkit.data.files import location
        from trainkit.data.preparation.card import print_card

        check_inspect(options)
        print_card(location(options.inspect, options.storage_options))
    elif options.export_hdf5 is not None and options.output_dir is None and is_prepared_folder(options):
        export(options, options.train_data_dir)
    else:
        check_options(options)
        refuse_prepared(options)
        prepare_images(options)
        if options.export_hdf5 is not None:
            export(options, options.output_dir)
        if options.push_to_hub:
            push(options)


def check_inspect(options: Options) -> None:
    """Raise `UserError` for flags that `--inspect`, which prepares nothing, would ignore."""
    taken = ("inspect", "storage_options", *inspect.get_annotations(TerminalOptions))
    defaults = Options()
    others = [
        f"--{field.name}"
        for field in fields(options)
        if field.name not in taken and getattr(options, field.name) != getattr(defaults, field.name)
    ]
    if others:
        raise UserError(
            f"--inspect prints what is in a prepared dataset and does nothing else: remove {' '.join(others)}"
        )


def check_options(options: Options) -> None:
    """Find mistakes before anything is listed or written. Raises `UserError`."""
    if options.output_dir is None:
        raise UserError("--output_dir is missing; give a folder for the prepared dataset")
    given = options.train_data_dir
    if options.dataset_name is None and given and Path(given).resolve() == Path(options.output_dir).resolve():
        raise UserError(f"--output_dir {options.output_dir} is the folder of --train_data_dir: give another folder")
    if options.dataset_name is None and given and "://" not in options.output_dir:
        from trainkit.data.files import location
        from trainkit.data.preparation.output import is_among_images

        if is_among_images(Path(options.output_dir), location(given, options.storage_options)):
            raise UserError(
                f"--output_dir {options.output_dir} is inside --train_data_dir {given}: the next preparation would "
                "read it with the images; choose a folder outside"
            )
    if options.push_to_hub:
        from trainkit.hub.options import repository_name

        if "://" in options.output_dir:
            raise UserError(f"--push_to_hub: --output_dir {options.output_dir} must be a folder of this machine")
        repository_name(options.hub_dataset_id, options.output_dir, "--hub_dataset_id")
    if options.ray_address is not None and options.engine != "ray":
        raise UserError("--ray_address is for --engine ray; give that too, or leave it out")
    if options.export_hdf5 is not None:
        from trainkit.data.preparation.export import check_export
        from trainkit.data.settings import settings_from_options

        check_export(Path(options.export_hdf5))
        if not settings_from_options(options).fixed_size:
            raise UserError(f"--export_hdf5 {options.export_hdf5} needs images of one size: add --center_crop")


def refuse_prepared(options: Options) -> None:
    """Raise `UserError` if `--train_data_dir` is prepared already; it names the settings that differ."""
    if not is_prepared_folder(options):
        return
    from trainkit.data.files import location
    from trainkit.data.format import read_preparation
    from trainkit.data.preparation.filtering import filters_from_options
    from trainkit.data.preparation.output import other_settings
    from trainkit.data.settings import settings_from_options

    given = options.train_data_dir
    held = read_preparation(location(given, options.storage_options))
    fix, wanted = "train on it", (settings_from_options(options), filters_from_options(options))
    if held is not None and (differing := other_settings(held, *wanted)):
        fix = f"for other settings ({'; '.join(differing)}) give the raw images, else {fix}"
    raise UserError(f"--train_data_dir {given} is a prepared dataset already: {fix}")


def prepare_images(options: Options) -> None:
    from trainkit.data.files import cache_root, location
    from trainkit.data.preparation.contact_sheet import write_contact_sheet
    from trainkit.data.preparation.filtering import filters_from_options
    from trainkit.data.preparation.pool import run_jobs_in_processes
    from trainkit.data.preparation.prepare import check_output, prepare
    from trainkit.data.settings import settings_from_options
    from trainkit.data.sources.opening import open_source

    settings, filters = settings_from_options(options), filters_from_options(options)
    output_dir, overwrite = location(options.output_dir, options.storage_options), options.overwrite_output_dir
    check_output(output_dir, settings, filters, overwrite)  # before a listing, which may take long
    engine, work_dir = run_jobs_in_processes, cache_root(options.cache_dir) / "work"
    if options.engine == "ray":
        from trainkit.data.preparation.ray_engine import ray_engine

        engine, work_dir = ray_engine(options.ray_address), None  # its workers do not share a folder of this machine
    source = open_source(options)
    prepare(
        source,
        settings,
        output_dir,
        options.num_proc,
        engine=engine,
        work_dir=work_dir,
        filters=filters,
        max_rejected_fraction=options.max_rejected_fraction,
        overwrite=overwrite,
    )
    if options.contact_sheet and (sheet := write_contact_sheet(output_dir, source)) is not None:
        say(f"look at {sheet} before training")


def is_prepared_folder(options: Options) -> bool:
    """Whether `--train_data_dir` is a prepared dataset, and the images are to come from it."""
    from trainkit.data.cache import is_prepared

    return options.dataset_name is None and is_prepared(options)


def export(options: Options, folder: str) -> None:
    """Write the prepared dataset in `folder` as `--export_hdf5`."""
    from trainkit.data.loading.dataset import PreparedImages
    from trainkit.data.preparation.export import export_hdf5

    images = PreparedImages(folder, storage_options=options.storage_options)
    export_hdf5(images, options.export_hdf5, options.hdf5_compression)


def push(options: Options) -> None:
    """Push the prepared dataset. A failure is a warning: the dataset itself is complete."""
    from trainkit.hub.contents import DATASET
    from trainkit.hub.options import clean_token, repository_name
    from trainkit.hub.share import Shared, share
    from trainkit.hub.upload import Push

    name, folder = repository_name(options.hub_dataset_id, options.output_dir), Path(options.output_dir)
    target = Push(name, is_private=options.hub_private_repo, token=clean_token(options.hub_token))
    outcome = share(Shared(folder, DATASET, options.hub_license), target)
    if outcome.failure is None:
        print(f"pushed to {outcome.url}", flush=True)
    else:
        again = shlex.join(["python", "push.py", str(folder), "--hub_dataset_id", name])
        print(f"WARNING: not pushed: {outcome.failure}; run {again}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
