"""Disk cache: compiled kernels, the module of launch.c, measured times.

It is inside Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache), in a directory that the user
owns and nobody else can write, because its files are executed. The cache only saves time: where it
cannot be used, a debug message says why, and nothing is cached.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

log = logging.getLogger(__name__)

LARGEST = 64 * 2**20  # bytes of a file; a cubin has a few hundred KiB
_SHA256 = ".sha256"
_never_free: set[str] = set()  # locks that were waited for in vain: not again


class Loadable(NamedTuple):
    """A file of the cache.

    opened  path for loading it, by the descriptor of the directory that was checked
    path    its path in the file system
    """

    opened: Path
    path: Path


def get(key: str, name: str, *, checked: bool = False) -> bytes | None:
    """The cached bytes, or None. checked: only if they match the SHA-256 stored by `put`."""
    with _folder() as folder:
        return None if folder is None else _get(folder, f"{key}/{name}", checked)


@contextlib.contextmanager
def loadable(key: str, name: str) -> Iterator[Loadable | None]:
    """The file, for loaders that need a path, if it matches the SHA-256 stored by `put`."""
    with _folder() as folder:
        if folder is None or _get(folder, f"{key}/{name}", True) is None:
            yield None
            return
        path = directory() / key / name
        opened = Path(f"/proc/self/fd/{folder}/{key}/{name}")
        yield Loadable(opened if opened.exists() else path, path)


def put(key: str, name: str, data: bytes, *, checked: bool = False) -> None:
    """Store a file, atomically for readers and other writers. checked: with its SHA-256."""
    with _folder() as folder:
        if folder is None:
            return
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(key, 0o700, dir_fd=folder)
            _replace(folder, f"{key}/{name}", data)
            if checked:
                _replace(folder, f"{key}/{name}{_SHA256}", _digest(data))
        except OSError as why:
            log.debug("%s is not cached: %s", name, why)


@contextlib.contextmanager
def lock(name: str, seconds: float) -> Iterator[None]:
    """Hold a lock that all processes with this cache share. Goes on without it if another process
    holds it for so many seconds, perhaps because it was stopped, or if the cache cannot be used."""
    with _folder() as folder, contextlib.ExitStack() as held:
        if folder is not None:
            file = filelock.FileLock(directory() / f"{name}.lock", mode=0o600)
            try:
                held.enter_context(file.acquire(timeout=0 if name in _never_free else seconds))
            except (OSError, NotImplementedError) as why:  # busy, read-only, or without locks
                log.debug("without the lock %s: %s", name, why)
                if isinstance(why, filelock.Timeout):
                    _never_free.add(name)
        yield


@functools.cache
def source_digest(folder: Path, *suffixes: str) -> str:
    """SHA-256 of the names and contents of the source files under a folder, for cache keys: an edit
    invalidates what was made from them."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in suffixes):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def directory() -> Path:
    """The cache's directory. Raises FileNotFoundError for a user without a home."""
    return _root() / _own()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _root() -> Path:
    """Triton's cache directory. Triton is not imported: measured times are useful without it."""
    if named := os.environ.get("TRITON_CACHE_DIR"):
        return Path(named)
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    if home.startswith("~"):
        raise FileNotFoundError("this user has no home directory, and HOME is not set")
    return Path(home, ".triton", "cache")


def _own() -> str:
    return f"graphquant-{os.geteuid()}"


@contextlib.contextmanager
def _folder() -> Iterator[int | None]:
    """The descriptor of our directory, checked, and created if missing; None if unusable."""
    try:
        folder = _opened(_root(), _own())
    except OSError as why:
        log.debug("no cache: %s", why)
        yield None
        return
    try:
        yield folder
    finally:
        os.close(folder)


def _opened(root: Path, name: str) -> int:
    root.mkdir(parents=True, exist_ok=True)
    outer = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if os.fstat(outer).st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{root} belongs to another user")
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=outer)
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
    finally:
        os.close(outer)
    if why := _foreign(os.fstat(folder)):
        os.close(folder)
        raise PermissionError(f"{root / name} {why}")
    return folder


def _foreign(about: os.stat_result) -> str | None:
    """Why another user may have written this, or None."""
    if about.st_uid != os.geteuid():
        return "belongs to another user"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


def _get(folder: int, path: str, checked: bool) -> bytes | None:
    try:
        data = _read(folder, path)
        if checked and _read(folder, path + _SHA256) != _digest(data):
            raise ValueError(f"{path} does not match its SHA-256")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as why:
        log.debug("not read from the cache: %s", why)
        return None
    return data


def _read(folder: int, path: str) -> bytes:
    # O_NONBLOCK: opening a pipe must not block
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, dir_fd=folder), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise ValueError(f"{path} is not a regular file, or too large")
        if why := _foreign(about):
            raise PermissionError(f"{path} {why}")
        return file.read()


def _replace(folder: int, path: str, data: bytes) -> None:
    made = f"{path}.{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(made, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(data)
        os.replace(made, path, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(made, dir_fd=folder)
        raise
