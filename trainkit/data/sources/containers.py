"""The files inside .zip, .tar and .tar.gz archives: listed without unpacking, read by their offsets."""

import bz2
import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from trainkit.data import faults
from trainkit.data.faults import RejectedImage
from trainkit.data.sources.locations import DataFile, Location, open_file, opened, read_range
from trainkit.data.sources.members import (
    CONTENT_EXTENSIONS,
    SAMPLE_EXTENSIONS,
    File,
    Span,
    clean_path,
)
from trainkit.data.sources.metadata import METADATA_NAMES

MAX_MEMBER_BYTES = 256 * 2**20  # a larger image file is rejected unread: memory stays bounded
MAX_CONTENT_BYTES = 2**20  # of a caption or a WebDataset .json
MAX_METADATA_BYTES = 2**30
ZIP_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, lengths of its name and its extra field
BROKEN_HEADERS = (NotImplementedError, ValueError, IndexError, OverflowError, struct.error)
STORED, DEFLATED, BZIP2 = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2


def _list_zip(archive: DataFile, file: BinaryIO) -> Iterator[File]:
    with zipfile.ZipFile(file) as opened_zip:
        for info in sorted(opened_zip.infolist(), key=lambda info: info.header_offset):
            if info.is_dir():
                continue
            fault, size = None, max(info.file_size, info.compress_size)
            if stat.S_ISLNK(info.external_attr >> 16):
                fault = faults.LINK, "a symbolic link, which is not followed"
            elif info.flag_bits & 1:
                fault = faults.ENCRYPTED, "it is encrypted; pack it without a password"
            elif info.compress_type not in (STORED, DEFLATED, BZIP2):
                fault = (
                    faults.UNSUPPORTED,
                    f"packed by method {info.compress_type}; stored, deflate and bzip2 are read",
                )
            path = clean_path(info.filename.replace("\\", "/"))
            stamp = f"{info.file_size} {info.CRC:08x}"
            span = Span(
                path, stamp, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            )
            fault = fault or _too_large(size)
            content = None
            if fault is None and _is_read_now(path, size, SAMPLE_EXTENSIONS):
                try:
                    content = _read_zip(archive, span)
                except RejectedImage as rejection:
                    fault = rejection.fault, str(rejection)
            yield File(span, content, fault)


def _too_large(size: int) -> tuple[str, str] | None:
    if 0 <= size <= MAX_MEMBER_BYTES:
        return None
    return faults.TOO_LARGE, f"{size:,} bytes; the limit is {MAX_MEMBER_BYTES:,}"


def _is_read_now(path: str, size: int, extensions: tuple[str, ...]) -> bool:
    if path.rpartition("/")[2].lower() in METADATA_NAMES:
        return size <= MAX_METADATA_BYTES
    return size <= MAX_CONTENT_BYTES and path.lower().endswith(extensions)


class _Bounded(io.RawIOBase):
    """A .tar's stream for its headers: a header that claims to be huge is not read into memory."""

    def __init__(self, file: BinaryIO | gzip.GzipFile):
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_CONTENT_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _list_tar(archive: DataFile, file: BinaryIO) -> Iterator[File]:
    is_packed = archive.kind == "tar.gz"
    stream = gzip.GzipFile(fileobj=file) if is_packed else file
    extensions = CONTENT_EXTENSIONS if is_packed else SAMPLE_EXTENSIONS  # once, now, rather than out of order later
    headers, place = tarfile.open(fileobj=_Bounded(stream), mode="r:", errorlevel=0), -1
    while (info := headers.next()) is not None:
        headers.members.clear()  # type: ignore[attr-defined]  # missing in the stubs; it grows without end
        if headers.offset <= place:
            raise tarfile.ReadError("a header leads back")
        place = headers.offset
        if info.isdir():
            continue
        fault = _too_large(info.size)
        if info.issym() or info.islnk():
            fault = faults.LINK, f"a link to {info.linkname[:200]}, which is not followed"
        elif not info.isreg():
            fault = faults.NOT_A_FILE, "a device or a pipe"
        elif info.sparse is not None:
            fault = faults.UNSUPPORTED, "stored with holes (sparse); pack it without --sparse"
        path = clean_path(info.name)
        span = Span(path, f"{archive.stamp} {info.offset_data} {info.size}", info.offset_data, info.size, info.size)
        content = None
        if fault is None and _is_read_now(path, info.size, extensions):
            stream.seek(info.offset_data)
            content = stream.read(info.size)
        yield File(span, content, fault)
    stream.seek(headers.offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {headers.offset:,}")


def read_span(archive: DataFile, span: Span) -> bytes:
    """The unpacked bytes of a member. Raises `RejectedImage` where they are not what the archive says."""
    if archive.kind == "zip":
        return _read_zip(archive, span)
    if archive.kind == "tar":
        content = read_range(archive.location, span.offset, span.size)
    else:
        stream = opened(_open_packed, archive.location)
        stream.seek(span.offset)
        content = stream.read(span.size)
    if len(content) < span.size:
        raise RejectedImage(faults.TRUNCATED, f"the archive ends after {len(content)} of its {span.size} bytes")
    return content


def _open_packed(location: Location) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=open_file(location))


def _read_zip(archive: DataFile, span: Span) -> bytes:
    header = read_range(archive.location, span.offset, ZIP_HEADER.size)
    if len(header) < ZIP_HEADER.size or not header.startswith(b"PK\3\4"):
        raise RejectedImage(faults.CORRUPT, "the archive has no file where its directory says")
    _, name_length, extra_length = ZIP_HEADER.unpack(header)
    start = span.offset + ZIP_HEADER.size + name_length + extra_length
    packed = read_range(archive.location, start, span.stored)
    if len(packed) < span.stored:
        raise RejectedImage(faults.TRUNCATED, f"the archive ends after {len(packed)} of its {span.stored} bytes")
    try:
        # One byte more than was declared is enough to see that there would be more.
        if span.method == DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, span.size + 1)
        elif span.method == BZIP2:
            content = bz2.BZ2Decompressor().decompress(packed, span.size + 1)
        else:
            content = packed
    except (zlib.error, OSError, EOFError) as error:
        raise RejectedImage(faults.CORRUPT, f"it cannot be unpacked: {error}") from None
    if len(content) != span.size or zlib.crc32(content) != span.crc:
        raise RejectedImage(
            faults.CORRUPT, f"it does not unpack to the {span.size:,} bytes and checksum that are declared"
        )
    return content


def list_archive(archive: DataFile) -> Iterator[File]:
    """The files inside; where it breaks off, a last one that says so."""
    list_files = _list_zip if archive.kind == "zip" else _list_tar
    damage = None
    try:
        with open_file(archive.location) as file:
            yield from list_files(archive, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, *BROKEN_HEADERS) as error:
        damage = faults.CORRUPT, f"no whole {archive.kind} file: {error}"
    except EOFError as error:
        damage = faults.TRUNCATED, f"it breaks off: {error}"
    except OSError as error:
        damage = "unreadable", error.strerror or str(error)
    if damage:
        yield File(Span(archive.name, "damage", archive.size), fault=damage, is_damage=True)
