"""Stored images in a fixed order: folders, zips, parquet files, lmdb databases (LSUN), the hub.

Archives are read member by member and never extracted; nothing is ever unpickled. A source that can't be had
or isn't whole is a `UserError`; a single image that can't be read is `Broken`.
"""

from __future__ import annotations

import os
import struct
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ebdiff.data.images import EXTENSIONS, FILE_BYTES, Broken, Item
from ebdiff.experiment.members import DatasetConfig
from ebdiff.experiment.places import given
from ebdiff.system.errors import UserError
from ebdiff.system.files import replacing
from ebdiff.system.progress import progress

CHUNK, PACKED = 16 * 2**20, 100  # bytes of a row group's images; larger ones pack to no less than 1/PACKED
DATABASE = "data.mdb"  # of a folder that is an lmdb


@dataclass(frozen=True)
class Collection:
    """Images from one place, always in the same order."""

    where: str  # for messages
    count: int
    items: Callable[..., Iterator[Item]]  # with a `stride` n every n-th, the others unread
    story: dict[str, str] = field(default_factory=dict)  # title, origin and licence


@contextmanager
def refusing(path: Path, wrong: str, *errors: type[Exception]) -> Iterator[None]:
    """Have what a library finds wrong with a file told in one line, as UserError."""
    try:
        yield
    except errors as error:
        raise UserError(f"{path}: {wrong} ({_line(error)}); copy it again") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name)
    return parts.suffix.lower() in EXTENSIONS and not any(
        p.startswith((".", "__MACOSX")) for p in parts.parts
    )


def _check_size(size: int) -> None:
    if size > FILE_BYTES:
        raise Broken(f"larger than {FILE_BYTES >> 20} MiB")


def _read_file(path: Path) -> bytes:
    if not path.is_file():  # a pipe would be waited for, a device never ends
        raise Broken("not a file")
    _check_size(path.stat().st_size)
    return path.read_bytes()


def local(dataset: DatasetConfig) -> Path | None:
    """The user's own copy, where `dataset.path` names one."""
    path = given(dataset.path, "dataset.path") if dataset.path else None
    if path is not None and not path.exists():
        raise UserError(f"{path}: no such file or folder; set dataset.path to your copy of {dataset.name}")
    return path


def below(path: Path) -> list[str]:
    """Every file below a folder, sorted by its path; links to folders are followed, into each folder once."""
    names, seen = [], set()
    for base, folders, files in os.walk(path, followlinks=True):
        if (place := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # which of several links is the one that is followed
        names += [(Path(base) / name).relative_to(path).as_posix() for name in files]
    return sorted(names)


def folder(path: Path) -> Collection:
    """Every image file below a folder, sorted by its path; other and hidden files are left alone."""
    names = list(filter(_is_image, below(path)))

    def items(stride: int = 1) -> Iterator[Item]:
        return (Item(str(path / name), partial(_read_file, path / name)) for name in names[::stride])

    return Collection(str(path), len(names), items)


def opened_zip(path: Path) -> zipfile.ZipFile:
    """A zip file; UserError if it is no whole one."""
    damage = zipfile.BadZipFile, OSError, RuntimeError, ValueError, struct.error
    with refusing(path, "not a whole zip file", *damage):
        return zipfile.ZipFile(path)


def zipped(path: Path) -> Collection:
    """Every image in a zip, sorted by name; refused as a whole where a member points outside it, or unpacks
    to more than an image may have.
    """  # fmt: skip
    archive = opened_zip(path)
    members = [m for m in archive.infolist() if m.filename and not m.is_dir()]
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in str(parts).partition("/")[0]:
            raise UserError(
                f"{path}: member {member.filename!r} points outside the archive; don't trust this file"
            )
        if member.file_size > FILE_BYTES:
            raise UserError(
                f"{path}: member {member.filename!r} unpacks to {member.file_size >> 20} MiB, "
                "which looks like a decompression bomb; don't trust this file"
            )
    images = sorted((m for m in members if _is_image(m.filename)), key=lambda m: m.filename)

    def items(stride: int = 1) -> Iterator[Item]:
        return (Item(f"{path}:{m.filename}", partial(archive.read, m)) for m in images[::stride])

    return Collection(str(path), len(images), items)


def by_folder(found: Collection) -> Collection:
    """With the folder that an image lies in as its class, where images have none of their own."""
    if next(found.items()).label is not None:
        return found

    def word(item: Item) -> str:
        return PurePosixPath(item.name.removeprefix(f"{found.where}:")).parent.name  # in a zip, or not

    numbers = {w: number for number, w in enumerate(sorted({word(item) for item in found.items()}))}

    def items(stride: int = 1) -> Iterator[Item]:
        return (replace(item, label=numbers[word(item)]) for item in found.items(stride))

    return replace(found, items=items)


def _columns(schema: Any, where: object) -> list[str]:
    """The column of images, binary or a struct with `bytes` (the hub's layout), and that of labels if any."""
    import pyarrow as pa

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [f.name for f in schema if holds_bytes(f.type)]
    if not found:
        columns = ", ".join(f"{f.name} ({f.type})" for f in schema) or "none"
        raise UserError(
            f"{where}: no image column (a struct with `bytes`, as on the hub, or binary); "
            f"columns found: {columns}"
        )
    images = next((name for name in ("image", "img") if name in found), found[0])
    label = schema.get_field_index("label")
    labelled = label >= 0 and pa.types.is_integer(schema.field(label).type)
    return [images, "label"] if labelled else [images]


def _rows(
    batches: Iterable[Any], columns: list[str], where: object, row: int = 0, files: bool = False
) -> Iterator[Item]:
    """The images of Arrow batches or tables, one after the other, from number `row`; see `_cell`."""
    for batch in batches:
        images, *labels = (batch.column(name) for name in columns)
        labels = labels[0].to_pylist() if labels else [None] * len(batch)
        for value, label in zip(images, labels, strict=True):
            yield Item(f"{where}:row {row}", partial(_cell, value, files), label)
            row += 1


def _cell(value: Any, files: bool) -> bytes:
    """The encoded image of an Arrow cell: binary, or a struct with bytes.

    Its path is followed only into `files` of the hub's library: one from elsewhere could name any file of
    this machine.
    """
    value = value.as_py()
    if isinstance(value, dict):
        if files and value["bytes"] is None and value.get("path"):
            return _read_file(Path(value["path"]))
        value = value["bytes"]
    if value is None:
        raise Broken("no image in this row")
    _check_size(len(value))
    return value


def parquet(paths: list[Path]) -> Collection:
    """The images of parquet files in the order given, with their labels where `label` holds integers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    errors = pa.ArrowException, OSError, ValueError

    def opened(path: Path) -> pq.ParquetFile:
        with refusing(path, "not a whole parquet file", *errors):
            if not path.is_file():  # a pipe would be waited for
                raise OSError("not a file")
            # Read as a stream: by default Arrow keeps what it has read until the end of the file.
            stream = dict(pre_buffer=False, buffer_size=2**20)
            return pq.ParquetFile(path, page_checksum_verification=True, **stream)  # of pages that have one

    count, columns = 0, {}
    for path in paths:
        with opened(path) as file:
            columns[path] = _columns(file.schema_arrow, path)
            count += file.metadata.num_rows

    def items(stride: int = 1) -> Iterator[Item]:
        before = 0  # rows of all files so far
        for path in paths:
            with opened(path) as file, refusing(path, "damaged", *errors):
                row = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    wanted = len(range(-before % stride, rows, stride))
                    batches = _batches(file, path, group, columns[path]) if wanted else ()
                    yield from islice(_rows(batches, columns[path], path, row), wanted)
                    row, before = row + rows, before + rows

    return Collection(str(paths[0] if len(paths) == 1 else paths[0].parent), count, items)


def _batches(file: Any, path: Path, group: int, columns: list[str]) -> Iterator[Any]:
    """The rows of a parquet file's row group, as many at a time as surely take `CHUNK` bytes, at least one.

    Images are packed already: what unpacks to a multiple of its size holds one cell many times, or nothing,
    and is refused.
    """
    told, (column, *labels) = file.metadata.row_group(group), columns
    parts = (told.column(k) for k in range(told.num_columns))
    part = next(p for p in parts if p.path_in_schema in (column, f"{column}.bytes"))
    size, stored = part.total_uncompressed_size, min(part.total_compressed_size, path.stat().st_size)
    bomb = UserError(
        f"{path}: row group {group} unpacks from {stored:,} bytes to more than {CHUNK >> 20} MiB, "
        "which looks like a decompression bomb; don't trust this file"
    )
    if size > max(CHUNK, PACKED * stored):
        raise bomb
    rows = max(1, min(64, CHUNK // max(1, size)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[part.path_in_schema, *labels]):
        if batch.column(column).nbytes > (size + 64) * len(batch):  # it lied about its size
            raise bomb
        yield batch


@cache
def _database(path: Path) -> Any:
    """An lmdb, opened once: the library refuses to open one twice."""
    import lmdb

    return lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)


def lmdb_of(path: Path) -> Collection:
    """Every value of an lmdb (LSUN) in the order of its keys."""
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{path}: an lmdb needs its library; pip install 'ebdiff[lmdb]'") from None
    with refusing(path, "not a whole lmdb", lmdb.Error):
        database = _database(path)
    pages, size = database.info()["last_pgno"] + 1, (path / DATABASE).stat().st_size
    if size < pages * database.stat()["psize"]:  # to touch what isn't there would end the process
        raise UserError(f"{path}: {DATABASE} is cut short, to {size:,} bytes; copy it again")

    def read(key: bytes) -> bytes:
        with database.begin(buffers=True) as content:
            value = content.get(key)
            _check_size(len(value))
            return bytes(value)

    def items(stride: int = 1) -> Iterator[Item]:
        with refusing(path, "damaged", lmdb.Error), database.begin() as content:
            for key in islice(content.cursor().iternext(values=False), 0, None, stride):
                yield Item(f"{path}:{key.decode(errors='backslashreplace')}", partial(read, key))

    return Collection(str(path), database.stat()["entries"], items)


def fetch(
    url: str,
    target: Path,
    check: Callable[[Path], str | None] = lambda _: None,
    otherwise: str = "set dataset.path to a local copy",
) -> Path:
    """Fetch a file, with progress, unless it is there; `check` says what is wrong before it gets its name."""
    if target.exists():
        return target
    with replacing(target) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, temporary.open("wb") as file:
                total = int(answer.headers.get("Content-Length", 0)) or None
                with progress(total=total, desc=target.name, unit="B", unit_scale=True) as bar:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
        except (OSError, HTTPException) as error:
            raise UserError(f"{url}: can't be fetched ({error}); try again, or {otherwise}") from None
        if wrong := check(temporary):
            raise UserError(f"{url}: {wrong}; try again")
    return target


def open_path(path: Path, split: str = "train") -> Collection:
    """Whatever images are at a path: a folder of images, an lmdb, a zip, a parquet file or a folder of them.

    Of a folder of parquet files those are taken whose name begins with the split's; for `train` all if
    none does. Nothing else has a test split.
    """
    if split == "train" and (path / DATABASE).is_file():
        return lmdb_of(path)
    if path.is_dir():
        images = folder(path)
        tables = [] if images.count else sorted(path / n for n in below(path) if n.endswith(".parquet"))
        named = [p for p in tables if p.name.startswith(split)]
        if named or (tables and split == "train"):
            return parquet(named or tables)
        if split == "train":
            return images
    if split != "train":
        raise UserError(
            f"{path}: holds no parquet files named {split}*; set dataset.held_out to a share, such as 0.1"
        )
    if path.suffix.lower() == ".parquet":
        return parquet([path])
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return zipped(path)
    raise UserError(
        f"{path}: not a folder, zip or parquet file; unpack it and set dataset.path to the folder"
    )


def not_had(what: str, instead: str, error: Exception) -> UserError:
    """What to tell of a repository of the hub that can't be had; `instead` is the key of a local copy."""
    cure = "check name and network"
    if "gated" in str(error).lower():
        cure = "accept its terms on its page at huggingface.co, then export HF_TOKEN"
    return UserError(f"{what}: can't be had ({_line(error)}); {cure}, or set {instead} to a local copy")


def from_hub(name: str, split: str = "train") -> Collection:
    """A split of a dataset on the Hugging Face hub, through the `datasets` library and its cache."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"dataset.hub {name}: needs the `datasets` library; pip install 'ebdiff[hub]', "
            "or set dataset.path to a local copy"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise not_had(f"dataset.hub {name}, split {split}", "dataset.path", error) from None
    columns = _columns(rows.features.arrow_schema, f"dataset.hub {name}")
    wanted = rows.select_columns(columns).with_format("arrow")
    story = {
        "title": name,
        "origin": f"https://huggingface.co/datasets/{name}",
        "licence": rows.info.license or "not stated",
    }
    return Collection(name, len(rows), lambda: _rows(wanted.iter(64), columns, name, files=True), story)
