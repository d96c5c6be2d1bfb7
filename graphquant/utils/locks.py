"""Locks that survive fork: released in the child if another thread held them."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from weakref import WeakSet


class Lock:
    """A threading.RLock that is released in a forked child.

    The child may find the guarded state half written, by a thread that it does not have. So that
    state must be valid, or detectably stale, at any time.
    """

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


def _release_in_child() -> None:
    for lock in list(_locks):
        try:
            lock._lock.release()
        except RuntimeError:  # not held by the forking thread, the only one left
            lock._lock = threading.RLock()
        else:
            lock._lock.acquire()


os.register_at_fork(after_in_child=_release_in_child)
