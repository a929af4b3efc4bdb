"""Reading and writing whole files: atomic writes, one-line errors, locks.

That a file is what was written is the business of its record (`experiment.records`); what is read here may
still be anything. Every reader raises `Missing` for a file that isn't there, and `Unusable` for one that is
damaged, cut short or of another kind.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ebdiff.system.errors import Missing, Unusable, UserError, damaged

TOLD = "ebdiff"  # the key of a safetensors file's metadata
# What files of ours never reach, in bytes: of JSON, of a safetensors header (parsed to 30 times as much), and
# of all arrays of an npz.
JSON, HEADER, ARRAYS = 2**26, 2**23, 2**32
DEFLATED = 1032  # times: no more can deflate pack


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file or a folder to; rename it to `path` when the block succeeds.

    Nothing half-written is ever left under the final name; on an error the temporary goes, and the error
    names `path`. It lies in a hidden folder of its own beside `path`, because libraries write temporaries
    of theirs: what a kill leaves there is found by its name and goes with the next write of `path`.
    """
    folder = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    with naming(path, folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        folder.mkdir(exist_ok=True)
        temporary = folder / path.name
        try:
            yield temporary
            if temporary.is_file():
                temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors shuts out all but the owner
            os.replace(temporary, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


LINKED = 10**9  # bytes, up to which Snakemake looks at a file's content instead of its date


def linked(source: Path, path: Path) -> None:
    """Another name for a file; a copy of a large one, whose date would change, or where links aren't."""
    with replacing(path) as temporary:
        if source.stat().st_size < LINKED:
            with suppress(OSError):
                os.link(source, temporary)
                return
        shutil.copy2(source, temporary)


def remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that were killed while writing `path` left behind."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.{platform.node()}-*"):
        try:
            os.kill(int(found.name.rpartition("-")[2]), 0)  # signal 0 only asks whether it lives
        except ProcessLookupError:
            shutil.rmtree(found, ignore_errors=True)
        except PermissionError:
            pass  # somebody else's, alive


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let an error of the operating system name `path` where it names nothing, or a temporary folder."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (temporary and str(error.filename).startswith(str(temporary))):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def reading(path: Path, *errors: type[Exception], what: str = "") -> Iterator[None]:
    """Let whoever reads a file be told that it is missing, no file (such as a device that never ends), or
    damaged, where one of `errors` came of it; the message says `what` they are.
    """  # fmt: skip
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # one look: another process may replace it
            raise Unusable(path, "not a file")
        yield
    except FileNotFoundError:
        raise Missing(path) from None
    except errors as error:
        raise damaged(path, f"{what}{error}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is refused, because it isn't JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON."""
    with reading(path, ValueError, RecursionError, what="not valid JSON: "):  # of JSON and of UTF-8
        if path.stat().st_size > JSON:
            raise damaged(path, f"larger than {JSON >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write a compressed npz atomically."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an npz (never unpickling); the zip's own checksums are compared."""
    zipped = (NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
    # np.load would parse members before their CRC is known.
    with reading(path, OSError, EOFError, ValueError, *zipped), zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > min(ARRAYS, DEFLATED * path.stat().st_size):
            raise ValueError(f"a decompression bomb: unpacks to {size:,} bytes")
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(archive.read(name)), allow_pickle=False
            )
            for name in archive.namelist()
        }


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a small npy atomically (through memory: NumPy's own writing doesn't tell a full disk)."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getvalue())


def write_header(file: BinaryIO, dtype: np.dtype | type, shape: tuple[int, ...]) -> None:
    """An npy's header, padded by NumPy so that the first axis can change in place."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_rows(
    path: Path, dtype: np.dtype | type, shape: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """Write an npy of a known shape atomically, from parts along its first axis, one in memory at a time."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_header(file, dtype, shape)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)


def load_memmap(path: Path) -> np.ndarray:
    """Memory-map an npy file."""
    with reading(path, ValueError, OSError, EOFError):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_told(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file of ours; reads no tensor."""
    with reading(path, SafetensorError, OSError), open_tensors(path, "numpy") as file:
        told = (file.metadata() or {}).get(TOLD, "")
    try:
        return dict(json.loads(told))
    except (ValueError, TypeError):
        raise Unusable(path, "holds no ebdiff network") from None


def open_tensors(path: Path, framework: str) -> safe_open:
    """Open a safetensors file; SafetensorError if it is none, or its header is out of all proportion."""
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > HEADER:
            raise SafetensorError(f"a header of more than {HEADER >> 20} MiB")
    return safe_open(path, framework=framework)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the lock of a state folder, which dies with its process; UserError if another one holds it.

    The lock file says who holds it. Whatever is half-written in the folder then belongs to nobody any more,
    and goes; what is empty afterwards goes, the lock included.
    """
    path = folder.with_name(f"{folder.name}.lock")
    with naming(folder):
        lock = _locked(path)
        try:
            path.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for unfinished in list(folder.rglob(".*")):
                shutil.rmtree(unfinished, ignore_errors=True)
            yield
        finally:
            # Before the lock is let go, so that nobody's new folder is taken away.
            with suppress(OSError):
                folder.rmdir()
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # unless another output's state is still there
            lock.release()


def held(folder: Path) -> bool:
    """Whether some process holds the lock of a state folder; asking makes no file and keeps nobody out."""
    try:
        with folder.with_name(f"{folder.name}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as `FileLock` does, until it is closed
    except FileNotFoundError:
        return False
    except OSError:  # held; or somebody else's, which we can't ask
        return True
    return False


def _locked(path: Path) -> FileLock:
    """The lock of a file, held; UserError if another process holds it."""
    # A moment, in which the one before tidies up; a soft lock would outlive a killed process.
    lock = FileLock(path, timeout=1, fallback_to_soft=False)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return lock
        except (FileNotFoundError, FileExistsError):
            # Who ended just now took the empty folder away, perhaps within mkdir: there, then not a folder.
            if os.path.lexists(path.parent) and not path.parent.is_dir():
                raise
        except Timeout:
            holder = path.read_text(encoding="utf-8").strip() if path.exists() else "that ends now"
            raise UserError(
                f"{path.with_suffix('')}: another process is at work on it (process {holder}); "
                "wait for it or end it, then run again"
            ) from None
