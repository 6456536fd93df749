"""Which kind of source the files are that `--train_data_dir` names."""

from trainkit.data.locations import find_files, is_url, read_storage_options
from trainkit.errors import UserError


def open_files(options):
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
        from trainkit.data.tables import ParquetFiles

        return ParquetFiles(files, name, options.vector_column)
    if kinds == {"hdf5"}:
        from trainkit.data.hdf5 import Hdf5File

        if len(files) > 1:
            raise UserError(f"--train_data_dir {given} names {len(files)} HDF5 files; give one")
        return Hdf5File(files[0], name, options.vector_column)
    from trainkit.data.archives import Archives

    is_folder = is_url(given) and not (files and kinds <= {"zip", "tar", "tar.gz"})
    return Archives(files, name, options.vector_column, root=given if is_folder else None)


def _name(given: str) -> str:
    """`photos` for photos.zip, s3://bucket/photos/ or photos-{00..99}.tar."""
    last = given.rstrip("/").rpartition("/")[2]
    return last.partition(".")[0].rstrip("-_{*") or "images"
