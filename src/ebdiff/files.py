"""Reading and writing whole files: atomic writes, checksums, one-line errors."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ebdiff.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to and rename it to `path` when the block succeeds.

    Nothing half-written is ever left under the final name; on an error the temporary goes. It lies in
    a hidden folder of its own beside `path`, because libraries write temporaries of theirs: what a
    kill leaves there is found by its name and goes with the next write of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    folder = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    temporary = folder / path.name
    try:
        yield temporary
        temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors shuts out everybody but the owner
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that were killed while writing `path` left behind."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.{platform.node()}-*"):
        try:
            os.kill(int(found.name.rpartition("-")[2]), 0)  # signal 0 only asks whether it lives
        except ProcessLookupError:
            shutil.rmtree(found, ignore_errors=True)
        except PermissionError:
            pass  # somebody else's, alive


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is refused, because it isn't JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make it with `snakemake --cores all {path}`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run again") from None


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write a compressed npz atomically."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an npz (never unpickling).

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make it with `snakemake --cores all {path}`") from None
    except (
        ValueError, OSError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, zlib.error, struct.error,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: unreadable ({error}); delete it and run again") from None


def load_memmap(path: Path) -> np.ndarray:
    """Memory-map an npy file.

    Raises:
        UserError: the file is missing, truncated or not an npy file.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make it with `snakemake --cores all {path}`") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: unreadable ({error}); delete it and run again") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the lock of a state folder; it dies with its process, however that ends.

    A `flock` on `{folder}.lock`: it works between processes of one machine and, on Linux, over NFS
    (Lustre needs the mount option `flock`). The file says who holds it. Whatever is half-written in the
    folder then belongs to nobody any more, and goes.

    Raises:
        UserError: another process holds it, such as a job that outlived its killed Snakemake.
    """
    path = folder.with_name(f"{folder.name}.lock")
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise FileNotFoundError  # its last holder has just finished and removed it
        except (BlockingIOError, FileNotFoundError):
            file.seek(0)
            raise UserError(
                f"{folder}: another process is at work on it (process {file.read().strip()}); "
                "wait for it or end it, then run again"
            ) from None
        file.truncate(0)
        print(f"{os.getpid()} on {platform.node()}", file=file, flush=True)
        for unfinished in list(folder.rglob(".*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield
        path.unlink(missing_ok=True)
    with suppress(OSError):  # another output's state is still there
        folder.parent.rmdir()
