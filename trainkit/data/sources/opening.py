"""Which kind of source it is that `--dataset_name` or `--train_data_dir` names."""

from pathlib import Path

from trainkit.data.sources.folder import ImageFolder
from trainkit.data.sources.hub import HubDataset
from trainkit.data.sources.locations import find_files, is_url, read_storage_options
from trainkit.errors import UserError


def open_source(options):
    """The source that a script's options (`SourceOptions`) name. Raises `UserError`."""
    vector_column = options.vector_column
    if options.dataset_name is not None:
        downloads = None if options.cache_dir is None else str(Path(options.cache_dir) / "downloads")
        name, config, split = options.dataset_name, options.dataset_config_name, options.dataset_split
        return HubDataset(name, config, split, downloads, vector_column=vector_column)
    if options.train_data_dir is None:
        raise UserError("give --train_data_dir FOLDER or --dataset_name NAME: where the images come from")
    folder = Path(options.train_data_dir.removeprefix("file://"))
    if (folder / "preparation.json").is_file():
        raise UserError(f"--train_data_dir {folder} is a prepared dataset already; train on it, or give raw images")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        flag, split = "--train_data_dir", options.dataset_split
        return HubDataset(str(folder), None, split, flag=flag, vector_column=vector_column)
    return _open_files(options) or ImageFolder(folder, vector_column=vector_column)


def _open_files(options):
    """A source of archives, of Parquet or HDF5 files, or of what lies below a URL; None for a folder of images.

    Raises `UserError`.
    """
    given, storage_options = options.train_data_dir, read_storage_options(options.storage_options)
    if given.startswith("memory://") and options.num_proc != 1:
        raise UserError(f"--train_data_dir {given} is seen by this process alone: give --num_proc 1")
    files = find_files(given, storage_options, "--train_data_dir")
    if files is None:
        return None
    name = _name(given)
    kinds = {file.kind for file in files}
    if kinds == {"parquet"}:
        from trainkit.data.sources.tables import ParquetFiles

        return ParquetFiles(files, name, options.vector_column)
    if kinds == {"hdf5"}:
        from trainkit.data.sources.hdf5 import Hdf5File

        if len(files) > 1:
            raise UserError(f"--train_data_dir {given} names {len(files)} HDF5 files; give one")
        return Hdf5File(files[0], name, options.vector_column)
    from trainkit.data.sources.archives import Archives

    is_folder = is_url(given) and not (files and kinds <= {"zip", "tar", "tar.gz"})
    return Archives(files, name, options.vector_column, root=given if is_folder else None)


def _name(given: str) -> str:
    """`photos` for photos.zip, s3://bucket/photos/ or photos-{00..99}.tar."""
    last = given.rstrip("/").rpartition("/")[2]
    return last.partition(".")[0].rstrip("-_{*") or "images"
