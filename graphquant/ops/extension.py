"""A C file as a Python module, built when it is needed by the system's compiler."""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)

SECONDS = 60  # for a compiler that takes 0.2


def extension(source: Path, name: str) -> ModuleType | None:
    """The module, or None without a C compiler or Python's headers; `name` is that of its PyInit.

    It is built anew in each process, in a directory that only this user can read and that is gone
    afterwards: nothing is loaded that somebody else may have written.
    """
    compiler = _compiler()
    if compiler is None:
        log.debug("%s is not built: there is no C compiler", name)
        return None
    with tempfile.TemporaryDirectory(prefix="graphquant-") as folder:
        library = Path(folder) / f"{name}.so"
        include = sysconfig.get_paths()["include"]
        command = [*compiler, "-O2", "-shared", "-fPIC", f"-I{include}", str(source), "-o"]
        try:
            done = subprocess.run(
                [*command, str(library)], capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as why:
            log.debug("%s is not built: %s", name, why)
            return None
        if done.returncode:
            log.debug("%s is not built: %s", name, done.stderr)
            return None
        return _load(library, name)


def _compiler() -> list[str] | None:
    if named := os.environ.get("CC"):
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return None if found is None else [found]


def _load(library: Path, name: str) -> ModuleType | None:
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as why:  # a compiler for another machine
        log.debug("%s is not loaded: %s", name, why)
        return None
    return module
