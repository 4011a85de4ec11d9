"""Images to predict on: single files, folders and Parquet sets, read in pieces.

Labels are not needed. Only names are kept in memory, so a set may have any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from raygkd.data.image_files import image_suffixes, known_suffixes
from raygkd.data.parquet import resolve
from raygkd.errors import DataError

# image files per piece, and rows of a Parquet file in memory at a time
PIECE = 64
_PARQUET = ".parquet"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive images: files, or a row group of a Parquet file.

    Attributes:
        source: path or URI of the file or folder that contains them.
        files: paths inside its file system.
        names: names of the files, as the user would write them.
        row_group: row group of a single Parquet file; None for image files.
        first_row: number of the row group's first row in the file.
        images: number of images.
    """

    source: str
    files: tuple[str, ...]
    names: tuple[str, ...]
    row_group: int | None
    first_row: int
    images: int


@dataclass(frozen=True)
class Encoded:
    """An encoded image.

    Attributes:
        name: name of its file.
        row: row in the file, from 0; None for an image file.
        content: the encoded image; empty if it cannot be read.
        problem: why it cannot be read; empty if it can.
    """

    name: str
    row: int | None
    content: bytes
    problem: str = ""


def find_pictures(paths: Sequence[str]) -> list[Piece]:
    """Return the images of files, folders and Parquet sets, in order; folders are sorted by name.

    A folder is searched recursively for files with the suffixes of images. If it contains Parquet
    files, only these are used.

    Args:
        paths: local paths, or ``s3://`` or ``gs://`` URLs.

    Raises:
        DataError: a path does not exist, a folder has no images, or a Parquet file has no image
            column.
        ConfigError: a URL is invalid.
    """
    return [piece for path in paths for piece in _pieces(path)]


def read_piece(piece: Piece) -> Iterator[Encoded]:
    """Yield the images of a piece, in order; ``problem`` is set for those that cannot be read."""
    filesystem, _ = resolve(piece.source)
    if piece.row_group is not None:
        yield from _read_rows(filesystem, piece)
        return
    for file, name in zip(piece.files, piece.names, strict=True):
        try:
            with filesystem.open_input_stream(file) as stream:
                content = stream.read()
        except OSError as error:
            yield Encoded(name, None, b"", _one_line(error))
        else:
            yield Encoded(name, None, content)


def _read_rows(filesystem: pyarrow.fs.FileSystem, piece: Piece) -> Iterator[Encoded]:
    [path], [name] = piece.files, piece.names
    row = piece.first_row
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            batches = file.iter_batches(PIECE, row_groups=[piece.row_group], columns=["image"])
            for batch in batches:
                column = batch.column("image")
                if pa.types.is_struct(column.type):
                    column = pc.struct_field(column, "bytes")
                for content in column.to_pylist():
                    yield Encoded(name, row, content or b"")
                    row += 1
    except (OSError, pa.ArrowException) as error:
        for unread in range(row, piece.first_row + piece.images):
            yield Encoded(name, unread, b"", _one_line(error))


def _pieces(path: str) -> Iterator[Piece]:
    filesystem, inner = resolve(path)
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pyarrow.fs.FileType.File:
            infos = [info]
        else:
            selector = pyarrow.fs.FileSelector(inner, recursive=True, allow_not_found=True)
            infos = filesystem.get_file_info(selector)
    except OSError as error:
        raise DataError(f"PATH {path}: cannot be read: {_one_line(error)}") from error
    if info.type == pyarrow.fs.FileType.NotFound and not infos:
        raise DataError(f"PATH {path}: no such file or folder")
    names = {
        file.path: path.rstrip("/") + file.path[len(inner) :]
        for file in sorted(infos, key=lambda file: file.path)
        if file.type == pyarrow.fs.FileType.File and not _is_hidden(file.path[len(inner) :])
    }
    tables = [file for file in names if file.endswith(_PARQUET)]
    for file in tables:
        yield from _row_groups(filesystem, path, file, names[file])
    if tables:
        return
    is_folder = info.type != pyarrow.fs.FileType.File
    suffixes = image_suffixes()
    images = [file for file in names if not is_folder or file.lower().endswith(suffixes)]
    if not images:
        raise DataError(f"PATH {path}: no images in this folder ({known_suffixes()} parquet)")
    for begin in range(0, len(images), PIECE):
        files = tuple(images[begin : begin + PIECE])
        yield Piece(
            source=path,
            files=files,
            names=tuple(names[file] for file in files),
            row_group=None,
            first_row=0,
            images=len(files),
        )


def _row_groups(
    filesystem: pyarrow.fs.FileSystem, source: str, path: str, name: str
) -> Iterator[Piece]:
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            schema = file.schema_arrow
            counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"PATH {name}: cannot be read as Parquet: {_one_line(error)}") from error
    kind = schema.field("image").type if "image" in schema.names else pa.null()
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"PATH {name}: has the columns {', '.join(schema.names)}; expected image (binary, or "
            "a struct with binary field bytes)"
        )
    first_row = 0
    for number, count in enumerate(counts):
        yield Piece(
            source=source,
            files=(path,),
            names=(name,),
            row_group=number,
            first_row=first_row,
            images=count,
        )
        first_row += count


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
