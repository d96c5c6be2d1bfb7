"""Extension modules in C and C++, compiled on the user's machine and cached on disk (cache.py)."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from graphquant.errors import KernelBuildError
from graphquant.ops.runtime import cache

log = logging.getLogger(__name__)

C = ("CC", ("gcc", "clang", "cc"))
CPP = ("CXX", ("g++", "clang++", "c++"))


def extension(
    sources: Sequence[Path],
    name: str,
    what: str,
    *,
    headers: Sequence[Path] = (),
    include: Sequence[Path] = (),
    options: Sequence[str] = (),
    about_to_build: Callable[[], None] = lambda: None,
) -> ModuleType:
    """A module built from C or C++ sources, or from the cache.

    what     needs it, for messages: "graphquant's CUDA kernels"
    headers  files of ours that the sources include: a change of one rebuilds the module
    include  folders for the compiler to search
    options  for compiling and linking

    Raises KernelBuildError if it cannot be built.
    """
    language = CPP if sources[0].suffix == ".cpp" else C
    command = [*compiler(language, what), "-O3", "-fPIC", *options]
    command += [f"-I{i}" for i in (str(sysconfig.get_config_var("INCLUDEPY")), *include)]
    file = name + str(sysconfig.get_config_var("EXT_SUFFIX"))
    texts = [f.read_text() for f in (*sources, *headers)]
    made_from = (*texts, *command, file, platform.platform(), sys.version)
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()
    if (module := _cached(key, name, file)) is not None:
        return module
    about_to_build()
    with tempfile.TemporaryDirectory(prefix="graphquant-") as folder:
        library = Path(folder, file)
        objects = [str(Path(folder, f"{i}.o")) for i in range(len(sources))]

        def compile_one(source: Path, made: str) -> None:
            _run([*command, "-c", str(source), "-o", made], what, language)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        _run([*command, "-shared", *objects, "-o", str(library)], what, language)
        cache.put(key, file, library.read_bytes(), checked=True)
        if (module := _cached(key, name, file)) is not None:
            return module
        return _load(name, library)


def _cached(key: str, name: str, file: str) -> ModuleType | None:
    with cache.loadable(key, file) as found:
        if found is None:
            return None
        try:
            module = _load(name, found.opened)
        except ImportError as why:
            log.debug("rebuilding %s: %s", file, why)
            return None
        module.__file__ = str(found.path)
        return module


def _load(name: str, library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def compiler(language: tuple[str, tuple[str, ...]], what: str) -> list[str]:
    """The command of the compiler. Raises KernelBuildError if there is none.

    language  C or CPP
    what      needs it, for the message
    """
    variable, usual = language
    if named := os.environ.get(variable):
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, usual)), None)
    if found is None:
        raise KernelBuildError(f"{_needs(language, what)}: none was found")
    return [found]


def _needs(language: tuple[str, tuple[str, ...]], what: str) -> str:
    variable, usual = language
    kind = "C++" if language is CPP else "C"
    known = " or ".join(usual[:2])
    return f"{what} need a {kind} compiler ({known}; the variable {variable} may name it)"


def _run(command: list[str], what: str, language: tuple[str, tuple[str, ...]]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as why:
        raise KernelBuildError(f"{_needs(language, what)}: {why}") from why
    if done.returncode:
        said = f"{shlex.join(command)} said: {done.stderr.strip()}"
        raise KernelBuildError(f"{_needs(language, what)}: {said}")
