"""Open the source that `--dataset_name` or `--train_data_dir` names."""

from dataclasses import replace
from pathlib import Path

from trainkit.data.account import Account, Kind
from trainkit.data.pairing import check_pairs_found
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.finding import find_files
from trainkit.data.sources.folder import ImageFolder
from trainkit.data.sources.hub import HubDataset
from trainkit.data.sources.locations import is_url, read_storage_options
from trainkit.data.sources.source import Source
from trainkit.data.sources.splits import ALL
from trainkit.errors import UserError
from trainkit.options.data import SourceOptions

ARCHIVES = {"zip", "tar", "tar.gz"}


def open_source(options: SourceOptions) -> Source:
    """The source that a script's options name. Raises `UserError`."""
    read = ReadOptions.of(options)
    source, given = _open_given(options, read), f"--train_data_dir {options.train_data_dir}"
    if options.dataset_name is not None:
        given = f"--dataset_name {options.dataset_name}"
    if read.conditioning_dir is not None and not isinstance(source, ImageFolder):
        raise UserError(
            f"--conditioning_data_dir {read.conditioning_dir} is for a folder of images, and {given} is none: give "
            "the conditioning images inside it (docs/data.md says how), or unpack it"
        )
    check_pairs_found(source.pairs, options, given)
    return source


def _open_given(options: SourceOptions, read: ReadOptions) -> Source:
    if options.dataset_name is not None:
        downloads = None if options.cache_dir is None else str(Path(options.cache_dir) / "downloads")
        return HubDataset(options.dataset_name, read.config, read.split, downloads, options=read)
    if options.train_data_dir is None:
        raise UserError("give --train_data_dir FOLDER or --dataset_name NAME: where the images come from")
    folder = Path(options.train_data_dir.removeprefix("file://"))
    if (folder / "preparation.json").is_file():
        raise UserError(f"--train_data_dir {folder} is a prepared dataset already; train on it, or give raw images")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return HubDataset(str(folder), None, read.split, flag="--train_data_dir", options=read)
    return _open_files(options.train_data_dir, options, read) or ImageFolder(folder, options=read)


def _open_files(given: str, options: SourceOptions, read: ReadOptions) -> Source | None:
    """A source of archives, of Parquet or HDF5 files, or of what is below a URL; None for a folder of images.

    Raises `UserError`.
    """
    storage_options = read_storage_options(options.storage_options)
    if given.startswith("memory://") and options.num_proc != 1:
        raise UserError(f"--train_data_dir {given} is visible to this process only: give --num_proc 1")
    found = find_files(given, storage_options, "--train_data_dir")
    if found is None:
        return None
    name, account, kinds = _name(given), Account(), {file.kind for file in found.files}
    is_image_folder = is_url(given) and not (found.files and kinds <= ARCHIVES | {"parquet", "hdf5"})
    files, is_split = found.files, False
    if files:
        files, is_split = found.of_split(read, given, account, is_image_folder)
    source: Source
    if kinds == {"parquet"}:
        from trainkit.data.sources.tables import ParquetFiles

        source = ParquetFiles(files, name, read)
    elif kinds == {"hdf5"}:
        from trainkit.data.sources.hdf5 import Hdf5File

        if len(files) > 1:
            raise UserError(f"--train_data_dir {given} names {len(files)} HDF5 files; give one")
        source = Hdf5File(files[0], name, read)
    else:
        from trainkit.data.sources.archives import Archives

        if is_split or is_image_folder:  # what is left belongs to the split
            read = replace(read, split=ALL)
        source = Archives(files, name, read, root=given if is_image_folder else None, metadata=found.metadata)
    if not getattr(source, "has_paths", False):
        for image in found.images:
            account.add(Kind.OTHER_FORMAT, image)
    not_read = (Kind.OTHER_SPLIT, Kind.NO_SPLIT, Kind.OTHER_FORMAT)
    account.add(Kind.FILES_FOUND, count=sum(account.counts.get(kind, 0) for kind in not_read))
    for table in found.tables:
        account.add(Kind.FILES_FOUND)
        account.add(Kind.TABLE_NOT_READ, table)
        account.ignore(table)
    source.account.merge(account)
    return source


def _name(given: str) -> str:
    """`photos` for photos.zip, s3://bucket/photos/ or photos-{00..99}.tar."""
    last = given.rstrip("/").rpartition("/")[2]
    return last.partition(".")[0].rstrip("-_{*") or "images"
