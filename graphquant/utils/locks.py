"""Locks that a forked process finds open, though another thread held them in its parent."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from weakref import WeakSet


class Lock:
    """A threading.RLock. What it guards must be right, or noticed to be stale, at any time: the
    thread that held it is not there in a forked process, and leaves things as they were."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


_locks: WeakSet[Lock] = WeakSet()


def _renew() -> None:
    for lock in list(_locks):
        try:
            lock._lock.release()
        except RuntimeError:  # not held by this thread, the only one that is left
            lock._lock = threading.RLock()
        else:
            lock._lock.acquire()


os.register_at_fork(after_in_child=_renew)
