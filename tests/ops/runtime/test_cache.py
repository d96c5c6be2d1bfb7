"""The cache holds what is run: it is the user's own, and whatever is wrong with it is no error."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graphquant.errors import KernelBuildError
from graphquant.ops.runtime import build, cache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="owners and modes of Linux")

KEY = "0" * 64


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_never_free", set())
    return tmp_path / "cache"


@pytest.fixture
def own(root: Path) -> Path:
    """Our directory in it."""
    cache.put(KEY, "other", b"other")
    (made,) = root.iterdir()
    return made


def works() -> bool:
    """Is what is put there found? Raises nothing, whatever is wrong."""
    for checked in (False, True):
        cache.put(KEY, f"file{checked}", b"content", checked=checked)
    found = [cache.get(KEY, f"file{checked}", checked=checked) for checked in (False, True)]
    with cache.loadable(KEY, "fileTrue") as file:
        found.append(None if file is None else file.opened.read_bytes())
    assert found in ([b"content"] * 3, [None] * 3)
    return found[0] is not None


def test_what_is_put_is_found_and_is_the_users_alone(own: Path) -> None:
    umask = os.umask(0)
    try:
        assert works()
    finally:
        os.umask(umask)
    for path in (own, *own.rglob("*")):
        wants = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wants and path.stat().st_uid == os.geteuid()
    with cache.loadable(KEY, "fileTrue") as file:
        assert file is not None and file.path.read_bytes() == b"content"
    assert cache.get(KEY, "another") is None and cache.get("1" * 64, "other") is None


def foreign(path: Path) -> Callable[[pytest.MonkeyPatch], None]:
    """As if another user had made it: only root can make it so."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        real, inode = os.fstat, path.stat().st_ino

        def fstat(fd: int) -> os.stat_result:
            about = real(fd)
            if about.st_ino != inode:
                return about
            return os.stat_result((*about[:4], 12345, *about[5:]))

        monkeypatch.setattr(os, "fstat", fstat)

    return change


@pytest.mark.parametrize("which", ["root", "own", "file"])
def test_what_belongs_to_another_user_is_not_used(
    which: str, root: Path, own: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path = {"root": root, "own": own, "file": own / KEY / "other"}[which]
    foreign(path)(monkeypatch)
    with caplog.at_level("DEBUG", "graphquant"):
        assert cache.get(KEY, "other") is None
        assert works() == (which == "file")
    assert "belongs to another user" in caplog.text
    assert {r.levelno for r in caplog.records} == {logging.DEBUG}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_that_was_given_away_is_not_used(root: Path, own: Path) -> None:
    for path in (own, root):
        os.chown(path, 12345, -1)
        assert not works() and cache.get(KEY, "other") is None
        os.chown(path, 0, -1)
    assert works()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_directory_that_others_may_write_is_not_used(mode: int, own: Path) -> None:
    own.chmod(mode)
    assert not works() and cache.get(KEY, "other") is None
    own.chmod(0o755)
    assert works() and cache.get(KEY, "other") == b"other"


def test_links_are_not_followed(own: Path, tmp_path: Path) -> None:
    secret = own / KEY / "other"
    moved = secret.rename(tmp_path / "moved")
    secret.symlink_to(moved)
    assert cache.get(KEY, "other") is None
    cache.put(KEY, "other", b"new")
    assert cache.get(KEY, "other") == b"new" and moved.read_bytes() == b"other"
    elsewhere = own.rename(tmp_path / "elsewhere")
    own.symlink_to(elsewhere)
    assert not works() and cache.get(KEY, "other") is None


def test_what_is_no_file_is_not_read(own: Path) -> None:
    os.mkfifo(own / KEY / "pipe")
    (own / KEY / "folder").mkdir()
    for name in ("pipe", "folder"):
        assert cache.get(KEY, name) is None
        cache.put(KEY, name, b"content")  # a directory stays one
    assert cache.get(KEY, "pipe") == b"content" and cache.get(KEY, "folder") is None


def test_a_directory_that_cannot_be_made_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/graphquant"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(path))
        with caplog.at_level("DEBUG", "graphquant"):
            assert not works()
        assert "no cache: " in caplog.text
        caplog.clear()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "replace"])
def test_a_directory_that_is_full_or_read_only_is_no_cache(
    code: int, call: str, own: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    before = sorted(own.rglob("*"))
    monkeypatch.setattr(os, call, fails)
    with caplog.at_level("DEBUG", "graphquant"):
        assert not works()
    assert os.strerror(code) in caplog.text
    assert sorted(own.rglob("*")) == before  # nothing half-written stays


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert works() and (tmp_path / ".triton" / "cache").is_dir()
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "triton"))
    assert works() and (tmp_path / "triton" / ".triton" / "cache").is_dir()
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no entry in passwd either
    monkeypatch.chdir(tmp_path)
    assert not works() and not (tmp_path / "~").exists()


@pytest.fixture
def held(own: Path) -> Iterator[None]:
    """Another process holds the lock "gpu", and is stopped."""
    source = f"""
import time, filelock
with filelock.FileLock({str(own / "gpu.lock")!r}):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        os.kill(other.pid, signal.SIGSTOP)
        yield
        other.kill()


def test_a_lock_that_another_process_holds_is_waited_for_and_not_for_ever(held: None) -> None:
    start = time.monotonic()
    with cache.lock("gpu", 0.5):
        assert time.monotonic() - start >= 0.5
    start = time.monotonic()
    with cache.lock("gpu", 60), cache.lock("another", 60):  # nor twice
        assert time.monotonic() - start < 30


def test_one_thread_at_a_time_has_a_lock(own: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with cache.lock("gpu", 60):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0


def test_a_lock_that_cannot_be_made_is_none(root: Path, own: Path) -> None:
    own.chmod(0o777)
    with cache.lock("gpu", 60):
        assert not list(own.glob("*.lock"))


def test_what_is_raised_under_a_lock_gives_it_back(own: Path) -> None:
    with pytest.raises(TimeoutError, match="a kernel"), cache.lock("gpu", 60):
        raise TimeoutError("a kernel")
    start = time.monotonic()
    with cache.lock("gpu", 60):
        assert time.monotonic() - start < 30


def test_writers_at_the_same_time_leave_a_whole_file(own: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(4)]
    seen: list[bytes | None] = []

    def write(content: bytes) -> None:
        for _ in range(20):
            cache.put(KEY, "file", content)
            seen.append(cache.get(KEY, "file"))

    threads = [threading.Thread(target=write, args=(c,)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80 and all(found in contents for found in seen)
    assert {p.name for p in (own / KEY).iterdir()} == {"file", "other"}


# --- a module of C --------------------------------------------------------------------------------

SOURCE = """
#include <Python.h>
static struct PyModuleDef about = {PyModuleDef_HEAD_INIT, "NAME", 0, -1, 0};
PyMODINIT_FUNC PyInit_NAME(void) {
  PyObject* module = PyModule_Create(&about);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""


@pytest.fixture
def built(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The linker's commands."""
    commands: list[list[str]] = []
    real = build._run

    def run(command: list[str], *args: Any) -> None:
        if "-shared" in command:
            commands.append(command)
        real(command, *args)

    monkeypatch.setattr(build, "_run", run)
    return commands


def extension(file: Path, name: str) -> Any:
    return build.extension([file], name, "tests")


def source(folder: Path, name: str, answer: int) -> Path:
    file = folder / f"{name}{answer}.c"
    file.write_text(SOURCE.replace("NAME", name).replace("ANSWER", str(answer)))
    return file


def test_a_module_is_built_once(tmp_path: Path, built: list[list[str]]) -> None:
    file = source(tmp_path, "once", 3)
    first, again = extension(file, "once"), extension(file, "once")
    assert first.answer == again.answer == 3 and len(built) == 1
    assert first.__file__ is not None and Path(first.__file__).exists()
    assert extension(source(tmp_path, "once", 4), "once").answer == 4 and len(built) == 2


@pytest.mark.parametrize("way", ["flipped", "replaced", "writable", "no hash", "another's hash"])
def test_a_module_that_is_not_what_was_built_is_built_again(
    way: str, tmp_path: Path, root: Path, built: list[list[str]]
) -> None:
    name = f"tampered_{way[0]}{way[-1]}"
    evil = Path(str(extension(source(tmp_path, name, 666), name).__file__))
    right = source(tmp_path, name, 3)
    file = Path(str(extension(right, name).__file__))
    assert file.parent != evil.parent
    content = bytearray(file.read_bytes())
    file.unlink()  # it is loaded: what is written there now must be another file
    file.write_bytes(content)
    file.chmod(0o600)
    built.clear()
    if way == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif way == "writable":
        file.chmod(0o666)
    elif way == "no hash":
        Path(f"{file}.sha256").unlink()
    elif way == "another's hash":
        Path(f"{file}.sha256").write_bytes(Path(f"{evil}.sha256").read_bytes())
    else:
        file.write_bytes(evil.read_bytes())
    assert extension(right, name).answer == 3 and len(built) == 1
    assert extension(right, name).answer == 3 and len(built) == 1


def test_a_module_that_cannot_be_loaded_is_built_again(
    tmp_path: Path, built: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source(tmp_path, "again", 3)
    extension(file, "again")
    real, failed = build._load, []

    def load(name: str, library: Path) -> Any:
        if not failed:
            failed.append(library)
            raise ImportError("wrong ELF class")
        return real(name, library)

    monkeypatch.setattr(build, "_load", load)
    assert extension(file, "again").answer == 3
    assert len(built) == 2 and len(failed) == 1


def test_without_a_cache_a_module_is_built_and_loaded(
    tmp_path: Path, built: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/graphquant")
    for n in (1, 2):
        assert extension(source(tmp_path, "bare", 3), "bare").answer == 3
        assert len(built) == n


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", None])
def test_without_a_compiler_it_is_said_what_is_needed(
    compiler: str | None, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"] if compiler else "")
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelBuildError, match=r"need a C compiler.*the variable CC may name it"):
        extension(source(tmp_path, "none", 3), "none")
