"""launch.c and launch.py on a driver that writes down what it is asked (driver.py): no GPU.

torch is imported where it is needed alone: most of these processes need only launch.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import struct
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ops.driver import (
    MAX_RECORDS,
    At,
    Driver,
    Stub,
    on_stub,
    on_stub_with_graphquant,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="launch.c is for Linux")

A, B, C = (At(0x7F0000000000 + 0x1000 * i) for i in range(3))
ODD = At(A.address + 8)  # 8 bytes aligned, not 16
STREAM = 0x1234


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return Stub(tmp_path_factory.mktemp("driver"))


def raises(error: type[BaseException], match: str, call: Any, *args: Any) -> None:
    with pytest.raises(error, match=match):
        call(*args)


def launch_of(driver: Driver, *params: tuple[Any, ...], **how: Any) -> Any:
    """A Launch of these params, of which the kernel declares the sizes."""
    how = {"grid": (1, 1, 1), "block": 32, "shared": 0, "cluster": 1, "pdl": False, **how}
    driver.sizes(*({"i32": 4, "f32": 4, "map": 128}.get(p[0], 8) for p in params))
    return driver.native.Launch(0xF00, params=params, keep=how.pop("keep", None), **how)


def map_of(tensor: int) -> tuple[Any, ...]:
    return ("map", tensor, 1, (100, 7), (112,), (64, 4), 2)


# --- Launch ------------------------------------------------------------------------------------


@on_stub
def test_params_of_every_kind_arrive_in_order(driver: Driver) -> None:
    launch = launch_of(
        driver,
        ("pointer", 1), ("i32", -7), ("i64", -(2**40)), ("f32", 0.1), ("null",), ("pointer", 0),
        map_of(2), ("i32", 2**31 - 1), ("pointer", 1),
    )  # fmt: skip
    assert launch(STREAM, A, B, C) is True
    (got,) = driver.launched
    values = [bytes(b) for b in got.bytes]
    assert got.number(0) == got.number(8) == B.address
    assert values[1][:4] == struct.pack("<i", -7)
    assert values[2][:8] == struct.pack("<q", -(2**40))
    assert values[3][:4] == struct.pack("<f", 0.1)
    assert got.number(4) == 0
    assert got.number(5) == A.address
    assert values[6] == struct.pack("<Q", C.address) + b"\1" * 120
    assert values[7][:4] == struct.pack("<i", 2**31 - 1)


@on_stub
def test_every_param_is_aligned_to_its_size_and_a_map_to_64_bytes(driver: Driver) -> None:
    params = [("i32", 1), ("pointer", 0), ("i32", 1), map_of(0), ("f32", 1.0), ("i64", 1)]
    params += [("i32", 1), map_of(1), ("i32", 1), ("null",)]
    launches = [launch_of(driver, *params) for _ in range(8)]  # wherever malloc puts them
    for launch in launches:
        launch(0, A, B)
    for got in driver.launched:
        for at, (kind, *_) in zip(got.at, params, strict=False):
            assert at % {"i32": 4, "f32": 4, "map": 64}.get(kind, 8) == 0, kind


@on_stub
def test_a_map_is_encoded_from_what_it_says(driver: Driver) -> None:
    launch_of(driver, ("map", 0, 6, (4096, 729), (8192,), (64, 128), 3))(0, A)
    (got,) = driver.encoded
    assert got.address == A.address
    assert (got.type, got.rank, list(got.sizes)[:2], got.strides[0]) == (6, 2, [4096, 729], 8192)
    assert (list(got.box)[:2], list(got.steps)[:2], got.swizzle) == ([64, 128], [1, 1], 3)
    assert (got.interleave, got.fill) == (0, 0)  # none, zeros
    assert got.promotion in (2, 3)  # to 128 or 256 bytes


@on_stub
def test_a_map_has_as_many_dims_as_sizes(driver: Driver) -> None:
    for dims in (1, 3, 5):
        firsts = ((10, dims), (160, dims - 1), (1, dims))
        sizes, strides, box = (tuple(range(first, first + n)) for first, n in firsts)
        launch_of(driver, ("map", 0, 9, sizes, strides, box, 3))(0, A)
        got = driver.encoded[-1]
        assert got.rank == dims
        assert (tuple(got.sizes)[:dims], tuple(got.strides)[: dims - 1]) == (sizes, strides)
        assert (tuple(got.box)[:dims], tuple(got.steps)[:dims]) == (box, (1,) * dims)


@on_stub
def test_a_map_is_encoded_again_only_for_another_address(driver: Driver) -> None:
    launch = launch_of(driver, map_of(0), map_of(1))
    for tensors in [(A, B), (A, B), (A, C), (B, C), (B, C)]:
        launch(0, *tensors)
        maps = [driver.launched[-1].number(i) for i in (0, 1)]
        assert maps == [t.address for t in tensors]
    assert [e.address for e in driver.encoded] == [t.address for t in (A, B, C, B)]


@on_stub
def test_grid_block_shared_memory_and_attributes(driver: Driver) -> None:
    how = {"grid": (5, 6, 7), "block": 384, "shared": 200_000}
    for cluster in (1, 2):
        for pdl in (False, True):
            launch_of(driver, ("pointer", 0), cluster=cluster, pdl=pdl, **how)(STREAM, A)
            got = driver.launched[-1]
            assert (got.function, got.stream) == (0xF00, STREAM)
            assert (list(got.grid), list(got.block)) == ([5, 6, 7], [384, 1, 1])
            assert got.shared == 200_000
            assert got.attributes == (cluster > 1) + pdl
            assert list(got.cluster) == ([2, 1, 1] if cluster == 2 else [0, 0, 0])
            assert got.serialization == pdl


@on_stub
def test_addresses_are_read_at_every_call(driver: Driver) -> None:
    launch = launch_of(driver, ("pointer", 0), ("pointer", 1))
    for tensors in [(A, B), (B, A), (C, C)]:
        launch(0, *tensors)
    assert [(v.number(0), v.number(1)) for v in driver.launched] == [
        (A.address, B.address), (B.address, A.address), (C.address, C.address),
    ]  # fmt: skip


@on_stub
def test_an_unaligned_address_launches_nothing(driver: Driver) -> None:
    for kind in (("pointer", 1), map_of(1)):
        launch = launch_of(driver, ("pointer", 0), kind)
        assert launch(0, A, ODD) is False
        assert launch(0, ODD, A) is False
        assert not driver.launched and not driver.encoded
    assert launch(0, A, B) is True


@on_stub
def test_tensors_that_no_param_reads_are_not_looked_at(driver: Driver) -> None:
    assert launch_of(driver, ("pointer", 1))(0, None, A, ODD) is True


@on_stub
def test_what_is_wrong_with_a_call_is_said(driver: Driver) -> None:
    launch = launch_of(driver, ("pointer", 2))
    raises(TypeError, "the kernel reads 3 tensors, got 2", launch, 0, A, B)
    raises(TypeError, "stream", launch)
    raises(TypeError, "", launch, "stream", A, B, C)
    raises(AttributeError, "data_ptr", launch, 0, A, B, None)
    raises(TypeError, "", launch, 0, A, B, At("x"))  # type: ignore[arg-type]
    raises(OverflowError, "", launch, 0, A, B, At(-1))
    assert not driver.launched
    assert launch(0, A, B, C) is True


@on_stub
def test_what_is_wrong_with_a_param_is_said(driver: Driver) -> None:
    for error, match, params in [
        (ValueError, "no param is called i8", (("i8", 1),)),
        (ValueError, "too many params", (("i32", 1),) * 33),
        (ValueError, "too many params", tuple(("pointer", i) for i in range(25))),
        (ValueError, "too many params", (map_of(0),) * 9),
        (ValueError, "position is not negative", (("pointer", -1),)),
        (TypeError, "a param is a tuple", ((),)),
        (TypeError, "a param is a tuple", ("null",)),
        (TypeError, "", (("pointer", "x"),)),
        (TypeError, "", (("map", 0, 1),)),
        (ValueError, "1 to 5 dims, not 0", (("map", 0, 1, (), (), (), 0),)),
        (ValueError, "1 to 5 dims, not 6", (("map", 0, 1, (8,) * 6, (8,) * 5, (8,) * 6, 0),)),
        (ValueError, "2 numbers where 1 ", (("map", 0, 1, (8, 8), (8, 8), (8, 8), 0),)),
        (ValueError, "1 numbers where 2 ", (("map", 0, 1, (8, 8), (8,), (8,), 0),)),
        (TypeError, "", (("map", 0, 1, (8, "8"), (8,), (8, 8), 0),)),
        (TypeError, "", ((1,),)),
    ]:
        raises(error, match, driver.native.Launch, 1, (1, 1, 1), 32, 0, 1, False, params, None)
    eight = launch_of(driver, *(map_of(0),) * 8)  # 1024 bytes: the most there may be
    assert eight(0, A) is True


@on_stub
def test_an_error_of_the_driver_is_raised_with_its_text(driver: Driver) -> None:
    launch = launch_of(driver, map_of(0))
    driver.set(answer_launch=700)
    why = "cuLaunchKernelEx: CUDA error 700, the stub was told to fail"
    raises(RuntimeError, why, launch, 0, A)
    driver.set(answer_launch=0, answer_encode=1)
    raises(RuntimeError, "cuTensorMapEncodeTiled: CUDA error 1, the stub", launch, 0, B)
    driver.set(answer_encode=0, answer_launch=999)
    raises(RuntimeError, r"cuLaunchKernelEx: CUDA error 999, \?", launch, 0, A)
    driver.set(answer_launch=0)
    assert launch(0, B) is True  # its map was not encoded for B when that failed
    assert driver.launched[-1].number(0) == B.address


@on_stub
def test_a_launch_keeps_what_owns_its_function(driver: Driver) -> None:
    owner = object()
    before = sys.getrefcount(owner)
    launch = launch_of(driver, ("null",), keep=owner)
    assert sys.getrefcount(owner) == before + 1
    del launch
    assert sys.getrefcount(owner) == before
    raises(ValueError, "no param", lambda: launch_of(driver, ("i8",), keep=owner))
    assert sys.getrefcount(owner) == before


# --- Site --------------------------------------------------------------------------------------


@on_stub
def test_a_site_prepares_once_and_then_launches(driver: Driver) -> None:
    asked: list[Any] = []
    launch = launch_of(driver, ("pointer", 1))

    def prepare(*tensors: Any) -> Any:
        asked.append(tensors)
        return launch

    site = driver.native.Site(prepare)
    assert site.ready is False
    assert site(STREAM, A, None) is None
    assert asked == [(A, None)] and not driver.launched and site.ready is True
    assert site(STREAM, A, B) is None
    assert site(STREAM + 1, None, C) is None
    assert asked == [(A, None)]
    got = [(v.stream, v.number(0)) for v in driver.launched]
    assert got == [(STREAM, B.address), (STREAM + 1, C.address)]


@on_stub
def test_a_site_without_a_launch_prepares_each_time(driver: Driver) -> None:
    asked: list[Any] = []
    site = driver.native.Site(lambda *tensors: asked.append(tensors))
    for tensor in (A, B, A):
        site(0, tensor)
        assert site.ready is False
    assert asked == [(A,), (B,), (A,)]


@on_stub
def test_a_site_prepares_again_for_an_unaligned_address(driver: Driver) -> None:
    asked: list[Any] = []
    first, second = (launch_of(driver, ("pointer", i)) for i in (0, 1))
    answers = iter([first, None, second])

    def prepare(*tensors: Any) -> Any:
        asked.append(tensors)
        return next(answers)

    site = driver.native.Site(prepare)
    site(0, A, B)
    site(0, ODD, B)  # nothing new: the first stays
    assert site.ready is True and not driver.launched
    site(0, A, B)
    site(0, ODD, B)  # now one that reads the other tensor
    site(0, ODD, B)
    assert asked == [(A, B), (ODD, B), (ODD, B)]
    assert [v.number(0) for v in driver.launched] == [A.address, B.address]


@on_stub
def test_a_copy_of_a_site_keeps_its_own_maps(driver: Driver) -> None:
    asked: list[Any] = []
    launch = launch_of(driver, map_of(0), ("pointer", 1))

    def prepare(*tensors: Any) -> Any:
        asked.append(tensors)
        return launch

    site = driver.native.Site(prepare)
    early = site.copy()
    site(0, A, B)
    copy = site.copy()
    assert (early.ready, copy.ready) == (False, True)
    for one, a, b in ((site, A, B), (copy, C, B), (site, A, C), (copy, C, A)):
        one(STREAM, a, b)
    assert asked == [(A, B)]
    got = [v.number(1) for v in driver.launched]
    assert got == [t.address for t in (B, B, C, A)]
    assert [e.address for e in driver.encoded] == [A.address, C.address]
    early(0, A, B)
    assert asked == [(A, B)] * 2 and early.ready is True


@on_stub
def test_a_site_is_usable_after_an_error(driver: Driver) -> None:
    launch = launch_of(driver, ("pointer", 0))
    answers: list[Any] = [ZeroDivisionError("once"), "a launch", launch]

    def prepare(*tensors: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    site = driver.native.Site(prepare)
    raises(ZeroDivisionError, "once", site, 0, A)
    raises(TypeError, "prepare must return a Launch or None", site, 0, A)
    assert site.ready is False
    site(0, A)
    driver.set(answer_launch=2)
    raises(RuntimeError, "CUDA error 2", site, 0, A)
    driver.set(answer_launch=0)
    raises(TypeError, "reads 1 tensors, got 0", site, 0)
    raises(TypeError, r"called with \(stream, \*tensors\)", site)
    raises(TypeError, r"called with \(stream, \*tensors\)", lambda: site(0, x=A))
    site(0, A)
    assert len(driver.launched) == 1


@on_stub
def test_a_site_may_be_replaced_from_within_its_own_launch(driver: Driver) -> None:
    """A data_ptr that runs Python may call the same site: here it prepares another launch."""
    site: Any = None
    inside = False

    class Calls:
        def data_ptr(self) -> int:
            nonlocal inside
            if not inside:
                inside = True
                site(0, ODD)  # unaligned: a new launch takes this one's place
            return B.address

    site = driver.native.Site(lambda *_: launch_of(driver, ("pointer", 0)))
    site(0, A)
    site(0, Calls())
    assert [v.number(0) for v in driver.launched] == [B.address]


@on_stub
def test_threads_do_not_mix_their_addresses(driver: Driver) -> None:
    """data_ptr in Python lets another thread in between two addresses; the driver, after them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    driver.set(delay_us=20)
    launch = launch_of(driver, ("pointer", 0), ("pointer", 1), map_of(2))
    site = driver.native.Site(lambda *_: launch)
    site(0, A, A, A)

    def work(mine: At) -> None:
        for _ in range(300):
            site(0, mine, mine, mine)

    threads = [threading.Thread(target=work, args=(At(4096 * (i + 1)),)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    sys.setswitchinterval(interval)
    seen = [{v.number(i) for i in range(3)} for v in driver.launched]
    assert len(seen) == 1200
    assert all(len(addresses) == 1 for addresses in seen)


@on_stub
def test_other_threads_run_while_the_driver_waits(driver: Driver) -> None:
    driver.set(delay_us=400_000)
    launch = launch_of(driver, ("pointer", 0))
    done: list[object] = []
    nothing: dict[str, object] = {}  # as threading.Thread passes it
    thread = threading.Thread(target=lambda: done.append(launch(0, A, **nothing)))
    thread.start()
    steps = 0
    while thread.is_alive():
        steps += 1
    thread.join()
    assert done == [True] and len(driver.launched) == 1
    assert steps > 100


def resident() -> int:
    """KiB of this process in memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@on_stub
def test_nothing_leaks(driver: Driver) -> None:
    launch = launch_of(driver, ("pointer", 0), map_of(1), ("pointer", 2))
    good = driver.native.Site(lambda *_: launch)
    never = driver.native.Site(lambda *_: None)
    wrong = driver.native.Site(lambda *_: 3)
    good(0, A, B, C)

    def loop(n: int) -> None:
        for i in range(n):
            good(STREAM, A, B if i % 2 else C, C)
            never(STREAM, A, B, C)
            good(STREAM, ODD, B, C)
            for bad in (wrong, good):
                with contextlib.suppress(TypeError):
                    bad(STREAM)
            driver.native.Launch(1, (1, 1, 1), 1, 0, 1, False, (("null",),), A)
            driver.native.Site(loop)
            good.copy()
            never.copy()

    def counts() -> list[int]:
        return [sys.getrefcount(w) for w in (A, B, C, launch, good, loop)]

    loop(MAX_RECORDS)  # so that all of the stub's own records have been written
    gc.collect()
    before, none, size = counts(), sys.getrefcount(None), resident()
    loop(100_000)
    gc.collect()
    assert counts() == before
    assert abs(sys.getrefcount(None) - none) < 1000  # others count as well
    assert resident() - size < 1024  # KiB: 100_000 of the smallest objects are 1562


# --- load and the driver itself ----------------------------------------------------------------


@on_stub
def test_load_gives_a_function_with_its_shared_memory(driver: Driver) -> None:
    assert driver.native.load(0, b"\x7fELF cubin".ljust(16, b"\0"), "kernel_name", 99_000) == 0x51
    assert driver.text("loaded") == b"\x7fELF cubin"
    assert driver.text("named") == b"kernel_name"
    assert driver.shared_limit == 99_000


@on_stub
def test_load_says_which_step_failed(driver: Driver) -> None:
    cubin = bytes(16)
    for answer, step in [
        ("answer_load", "cuModuleLoadData"),
        ("answer_function", "kernel_name"),
        ("answer_set", "cuFuncSetAttribute"),
    ]:
        driver.set(**{answer: 200})
        why = f"{step}: CUDA error 200, the stub was told"
        raises(RuntimeError, why, driver.native.load, 0, cubin, "kernel_name", 0)
        driver.set(**{answer: 0})
    raises(TypeError, "", driver.native.load, 0, "text", "kernel_name", 0)


# --- threads that have no context yet ----------------------------------------------------------

ON_3 = At((3 << 32) + 4096)  # the stub reads an address's device off its upper half


@on_stub
def test_a_thread_without_a_context_launches_on_the_device_of_the_tensors(driver: Driver) -> None:
    launch = launch_of(driver, ("null",), ("pointer", 0))
    driver.set(no_context=1)
    assert launch(STREAM, ON_3) is True
    assert driver.last_device == 3 and len(driver.launched) == 1
    assert driver.launched[0].number(1) == ON_3.address


@on_stub
def test_a_thread_without_a_context_loads_on_the_device_that_it_names(driver: Driver) -> None:
    driver.set(no_context=1)
    assert driver.native.load(2, bytes(16), "kernel_name", 0) == 0x51
    assert driver.last_device == 2


@on_stub
def test_what_keeps_a_thread_from_a_context_is_named(driver: Driver) -> None:
    launch = launch_of(driver, ("pointer", 0))
    steps = {
        "answer_pointer": "cuPointerGetAttribute",
        "answer_device": "cuDeviceGet",
        "answer_retain": "cuDevicePrimaryCtxRetain",
        "answer_enter": "cuCtxSetCurrent",
    }
    for answer, step in steps.items():
        driver.set(no_context=1, **{answer: 200})
        raises(RuntimeError, f"{step}: CUDA error 200", launch, STREAM, ON_3)
        if answer != "answer_pointer":
            load = driver.native.load
            raises(RuntimeError, f"{step}: CUDA error 200", load, 0, bytes(16), "name", 0)
        driver.set(**{answer: 0})
    assert not driver.launched


NATIVE = "from graphquant.ops.runtime.launch import native; native()"


def test_a_driver_that_is_too_old_is_named_so(stub: Stub) -> None:
    child = stub.python("-c", NATIVE, driver="old")
    assert "OSError: the NVIDIA driver has no cuGetErrorString: it is too old" in child.stderr


def test_a_driver_that_is_not_there_is_named_so(stub: Stub) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        child = stub.python("-c", NATIVE, driver="none")
        assert "OSError: libcuda.so.1 was not found: is the NVIDIA driver" in child.stderr
    else:
        pytest.skip("this machine has an NVIDIA driver")


# --- launch.py: what happens while a kernel runs for the first time -----------------------------


def watching() -> Any:
    """graphquant.ops.runtime.launch, where CPU tensors have a stream, and five of them."""
    import torch

    from graphquant.ops.runtime import launch

    launch.stream_of = lambda device: STREAM
    made = [torch.zeros(64) for _ in range(5)]
    assert all(t.data_ptr() % 16 == 0 for t in made)
    return launch, made


@on_stub_with_graphquant
def test_a_kernel_that_launched_once_is_repeated_on_other_tensors(driver: Driver) -> None:
    launch, (x, y, other, out, _) = watching()
    driver.sizes(8, 4, 8, 128)
    owner = object()

    def run() -> None:
        params = [
            ("pointer", y),
            ("i32", 3),
            ("pointer", x),
            ("map", x, 1, (8, 8), (32,), (8, 8), 0),
        ]
        launch.launch(0xF00, 11, 64, 4096, params, owner, cluster=2, pdl=True)

    made = launch.prepare(run, (x, None, y))
    assert len(driver.launched) == 1
    assert made(STREAM, other, None, out) is True
    first, again = driver.launched
    for got, a, b in ((first, x, y), (again, other, out)):
        assert (got.number(0), got.number(2)) == (b.data_ptr(), a.data_ptr())
        assert got.number(3) == a.data_ptr() and bytes(got.bytes[1])[:4] == b"\3\0\0\0"
        assert (got.function, got.stream, got.shared) == (0xF00, STREAM, 4096)
        assert (list(got.grid), list(got.block)) == ([11, 1, 1], [64, 1, 1])
        assert list(got.cluster) == [2, 1, 1] and got.serialization == 1
    count = sys.getrefcount(owner)
    del made
    assert sys.getrefcount(owner) == count - 1


@on_stub_with_graphquant
def test_only_one_launch_on_the_callers_own_tensors_can_be_repeated(driver: Driver) -> None:
    launch, (x, y, z, *_) = watching()
    driver.sizes(8, 8)

    def on(a: Any, b: Any) -> None:
        launch.launch(1, 1, 32, 0, [("pointer", a), ("pointer", b)])

    def both() -> None:
        on(x, y)
        on(x, y)

    assert launch.prepare(lambda: on(x, y), (x, y)) is not None
    assert launch.prepare(lambda: on(x, y.clone()), (x, y)) is None  # a copy
    assert launch.prepare(lambda: on(x, y[:]), (x, y)) is None  # may be another part next time
    assert launch.prepare(lambda: on(x, z), (x, y)) is None
    assert launch.prepare(both, (x, y)) is None
    assert launch.prepare(lambda: None, (x, y)) is None
    assert len(driver.launched) == 6  # whether or not: the kernel ran


@on_stub_with_graphquant
def test_a_tensor_given_twice_may_be_two_next_time(driver: Driver) -> None:
    launch, (x, y, *_) = watching()
    driver.sizes(8, 8)

    def run(*params: Any) -> Any:
        return lambda: launch.launch(1, 1, 32, 0, [("pointer", p) for p in params])

    assert launch.prepare(run(x, x), (x, x)) is None
    assert launch.prepare(run(x, y), (x, x, y)) is None
    assert launch.prepare(run(y, y), (x, x, y)) is not None
    assert launch.prepare(run(x, x), (None, x, None)) is not None


@on_stub_with_graphquant
def test_what_is_unwatched_is_no_launch_of_the_kernel(driver: Driver) -> None:
    launch, (x, *_) = watching()
    driver.sizes(8)

    def one() -> None:
        launch.launch(1, 1, 32, 0, [("pointer", x)])

    def measures_first() -> None:
        with launch.unwatched():
            one()
            assert launch.prepare(one, (x,)) is not None
            one()
        one()

    assert launch.prepare(measures_first, (x,)) is not None
    with launch.unwatched():
        one()
    assert len(driver.launched) == 5


@on_stub_with_graphquant
def test_a_watch_ends_with_its_kernel(driver: Driver) -> None:
    launch, (x, y, *_) = watching()
    driver.sizes(8)

    def one() -> None:
        launch.launch(1, 1, 32, 0, [("pointer", x)])

    def fails() -> None:
        one()
        raise ZeroDivisionError

    def fails_unwatched() -> None:
        with launch.unwatched():
            raise ZeroDivisionError

    def in_another_thread() -> None:
        thread = threading.Thread(target=one)
        thread.start()
        thread.join()
        one()

    raises(ZeroDivisionError, "", launch.prepare, fails, (x,))
    raises(ZeroDivisionError, "", launch.prepare, fails_unwatched, (x,))
    one()  # nobody watches
    assert launch.prepare(one, (x,)) is not None
    assert launch.prepare(in_another_thread, (x,)) is not None

    def calls_another_op() -> None:
        one()
        launch.prepare(lambda: launch.launch(2, 1, 32, 0, [("pointer", y)]), (y,))
        one()

    assert launch.prepare(calls_another_op, (x,)) is None


@on_stub_with_graphquant
def test_launch_refuses_an_unaligned_address(driver: Driver) -> None:
    launch, (x, *_) = watching()
    driver.sizes(8)
    odd = x[1:]
    raises(ValueError, "16 bytes", launch.launch, 1, 1, 32, 0, [("pointer", odd)])
    assert not driver.launched


class Compiled:
    """What Triton returns from a launch: as much of it as launch_triton reads."""

    def __init__(self, signature: dict[str, str], **metadata: Any) -> None:
        self.src = SimpleNamespace(signature=signature)
        self.function = 0xABC
        plain = {"num_warps": 4, "shared": 512, "num_ctas": 1, "launch_pdl": False}
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        self.metadata = SimpleNamespace(**{**plain, **scratch, **metadata})

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **meta: self


SIGNATURE = {
    "x_ptr": "*fp16", "bias_ptr": "constexpr", "y_ptr": "*i8", "M": "i32", "big": "i64",
    "eps": "fp32", "one": "constexpr", "BLOCK": "constexpr",
}  # fmt: skip


@on_stub_with_graphquant
def test_a_triton_kernel_is_repeated_with_its_own_signature(driver: Driver) -> None:
    launch, (x, y, other, out, _) = watching()
    driver.sizes(8, 8, 4, 8, 4, 8, 8)
    kernel = Compiled(SIGNATURE, launch_pdl=True)

    def run() -> None:
        launch.launch_triton(kernel, (9, 8), x, None, y, 77, 2**33, 1e-5, 1, BLOCK=128)

    made = launch.prepare(run, (x, y))
    assert not driver.launched  # Triton itself launches the first time
    count = sys.getrefcount(kernel)
    assert made(STREAM, other, out) is True
    (got,) = driver.launched
    assert got.function == 0xABC and list(got.grid) == [9, 8, 1]
    assert list(got.block) == [128, 1, 1] and got.shared == 512
    assert got.serialization == 1 and got.attributes == 1
    assert (got.number(0), got.number(1)) == (other.data_ptr(), out.data_ptr())
    assert bytes(got.bytes[2])[:4] == struct.pack("<i", 77)
    assert got.number(3) == 2**33
    assert bytes(got.bytes[4])[:4] == struct.pack("<f", 1e-5)
    assert got.number(5) == got.number(6) == 0  # two scratch buffers that it has not
    del made
    assert sys.getrefcount(kernel) == count - 1  # the Launch had kept it


@on_stub_with_graphquant
def test_a_triton_kernel_that_needs_more_is_not_repeated(driver: Driver) -> None:
    launch, (x, y, *_) = watching()
    types = {"x_ptr": "*fp16", "y_ptr": "*i8", "M": "i32"}

    def prepared(kernel: Any, *args: Any) -> Any:
        return launch.prepare(lambda: launch.launch_triton(kernel, (1,), *args), (x, y))

    assert prepared(Compiled(types), x, y, 3) is not None
    for metadata in (
        {"global_scratch_size": 64},
        {"profile_scratch_size": 64},
        {"num_ctas": 2},
    ):
        assert prepared(Compiled(types, **metadata), x, y, 3) is None
    for other in ("u32", "fp64", "u1", "tensordesc<fp16[64, 64]>"):
        assert prepared(Compiled({**types, "M": other}), x, y, 3) is None
    assert prepared(Compiled(types), x, y.clone(), 3) is None
    odd = x[1:]
    unaligned = launch.prepare(
        lambda: launch.launch_triton(Compiled(types), (1,), odd, y, 3), (odd, y)
    )
    assert unaligned is None  # compiled for that: it would be slow for all others

    class Interpreted:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **meta: None

    assert prepared(Interpreted(), x, y, 3) is None
    launch.launch_triton(Compiled(types), (1,), x, y, 3)  # unwatched: nothing is made


# --- Op.site: from an op's arguments to a launch -------------------------------------------------


def demo(launch: Any) -> Any:
    """An op whose kernel writes x * factor in Python, and launches."""
    from graphquant.errors import UnsupportedInputError
    from graphquant.ops.define import define

    def check(x: Any, bias: Any, factor: float, gamma: Any) -> None:
        if x.dim() != 1:
            raise UnsupportedInputError("x has one dim")

    schema = "(Tensor x, Tensor? bias, float factor, Tensor gamma) -> (Tensor y, Tensor z)"

    def fake(x: Any, bias: Any, factor: float, gamma: Any) -> Any:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @define(schema, fake=fake, check=check, float_form=fake, kernels=())
    def demo_of_sites(x: Any, bias: Any, factor: float, gamma: Any) -> Any:
        return x * factor, x

    runs: list[Any] = []

    @demo_of_sites.kernel("only", refuses=lambda x, *_: "too long" if len(x) > 1000 else None)
    def only(x: Any, bias: Any, factor: float, gamma: Any, out: Any) -> None:
        runs.append((x, bias, factor, gamma))
        y, z = out
        y.copy_(x * factor)
        z.copy_(x)
        bias_param = ("null",) if bias is None else ("pointer", bias)
        params = [("pointer", x), bias_param, ("f32", factor), ("pointer", gamma), ("pointer", y)]
        launch.launch(0xF00, 1, 32, 0, [*params, ("pointer", z)])

    return demo_of_sites, runs


@on_stub_with_graphquant
def test_a_site_of_an_op_runs_its_kernel_once_and_then_launches(driver: Driver) -> None:
    import torch

    from graphquant.errors import UnsupportedInputError
    from graphquant.ops.define import OPS, site

    launch, (x, gamma, y, z, other) = watching()
    driver.sizes(8, 8, 4, 8, 8, 8)
    op, runs = demo(launch)
    assert op.tensors == (True, True, False, True)
    assert OPS["demo_of_sites"] is op
    here = site("demo_of_sites", 2.5)
    here(STREAM, x.fill_(2), None, gamma, y, z)
    assert [r[1:3] for r in runs] == [(None, 2.5)] and runs[0][3] is gamma
    assert y.eq(5).all() and z.eq(2).all() and here.ready
    here(STREAM, other, None, x, y, z)
    assert len(runs) == 1
    first, again = driver.launched
    assert [again.number(i) for i in (0, 1, 3, 4, 5)] == [
        other.data_ptr(), 0, x.data_ptr(), y.data_ptr(), z.data_ptr(),
    ]  # fmt: skip
    assert bytes(first.bytes[2]) == bytes(again.bytes[2])

    with_bias = op.site(1.0)
    with_bias(STREAM, x, other, gamma, y, z)
    assert with_bias.ready and driver.launched[-1].number(1) == other.data_ptr()
    for bad, why in [(torch.ones(2, 2), "x has one dim"), (torch.ones(1001), "only: too long")]:
        raises(UnsupportedInputError, why, op.site(1.0), STREAM, bad, None, gamma, y, z)


@on_stub_with_graphquant
def test_calls_of_varying_sizes_run_each_kernel_once_in_all(driver: Driver) -> None:
    """Two calls in a graph: what the first has launched, the second launches as well."""
    from graphquant.ops.define import sized_site

    launch, (x, gamma, y, z, _) = watching()
    driver.sizes(8, 8, 4, 8, 8, 8)
    op, runs = demo(launch)
    one, two = sized_site("demo_of_sites"), sized_site("demo_of_sites")
    for n in (64, 32, 64):
        given = x[:n], None, gamma, y[:n], z[:n]
        one(STREAM, (n,), (2.5,), *given)
        two(STREAM, (n,), (2.5,), *given)
    assert len(runs) == len(op._sites) == 2
    assert len(driver.launched) == 6 and driver.launched[-1].number(4) == y.data_ptr()
    two(STREAM, (7,), (3.5,), x, None, gamma, y, z)  # another constant
    assert len(runs) == 3


@on_stub_with_graphquant
def test_eager_calls_of_equal_shapes_share_a_site(driver: Driver) -> None:
    import torch

    from graphquant.ops import define

    launch, (x, gamma, bias, *_) = watching()
    driver.sizes(8, 8, 4, 8, 8, 8)
    define.stream_of = launch.stream_of
    torch.cuda.current_device = lambda: None  # the index of a CPU tensor's device
    op, runs = demo(launch)
    y, z = op._on_cuda(x.fill_(3), None, 2.0, gamma)
    assert y.eq(6).all() and z.eq(3).all()
    y, z = op._on_cuda(x + 1, None, 2.0, gamma)
    assert len(runs) == 1 and driver.launched[-1].number(4) == y.data_ptr()
    op._on_cuda(x, bias, 2.0, gamma)  # another argument is given,
    op._on_cuda(x, None, 3.0, gamma)  # another constant,
    op._on_cuda(x[::2], None, 2.0, gamma)  # stride,
    op._on_cuda(x[:32], None, 2.0, gamma)  # size,
    op._on_cuda(x.double(), None, 2.0, gamma)  # dtype
    assert len(runs) == len(op._sites) == 6
    define.MAX_SITES = 6
    op._on_cuda(x[:8], None, 2.0, gamma)
    assert len(op._sites) == 1  # as many shapes as there may be: start anew


@on_stub_with_graphquant
def test_results_of_another_size_have_a_site_of_their_own(driver: Driver) -> None:
    """Where sizes depend on values: a kernel may be launched with them."""
    import torch

    from graphquant.ops import define

    launch, (x, *_) = watching()
    driver.sizes(8, 8)
    define.stream_of = launch.stream_of
    torch.cuda.current_device = lambda: None
    runs: list[int] = []

    @define.define(
        "(Tensor x) -> Tensor y",
        fake=lambda x: x.new_empty(x.shape),
        check=lambda x: None,
        float_form=lambda x: x,
        kernels=(),
        sized=lambda x: x.new_empty(int(x[0])),
    )
    def demo_of_sizes(x: Any) -> Any:
        return x

    @demo_of_sizes.kernel("only")
    def only(x: Any, out: Any) -> None:
        (y,) = out
        runs.append(len(y))
        launch.launch(0xF00, 1, 32, 0, [("pointer", x), ("pointer", y)])

    op: Any = demo_of_sizes
    for first in (3, 3, 5, 3):
        assert len(op._on_cuda(x.fill_(first))) == first
    assert runs == [3, 5] and len(driver.launched) == 4


@on_stub_with_graphquant
def test_last_arguments_that_torch_leaves_out_have_their_places(driver: Driver) -> None:
    """It hands over (x,) for (x, None, None), and (x, None, 2.0) as it is."""
    import torch

    from graphquant.ops import define

    launch, (x, factor, *_) = watching()
    driver.sizes(8, 8, 4, 8)
    define.stream_of = launch.stream_of
    torch.cuda.current_device = lambda: None
    schema = "(Tensor x, Tensor? factor=None, float? clip=None) -> Tensor y"
    runs: list[Any] = []

    def make(x: Any, *_: Any) -> Any:
        return x.new_empty(x.shape)

    @define.define(schema, fake=make, float_form=make, check=lambda *_: None, kernels=())
    def demo_of_defaults(x: Any, factor: Any = None, clip: Any = None) -> Any:
        return x

    @demo_of_defaults.kernel("only")
    def only(x: Any, factor: Any = None, clip: Any = None, *, out: Any) -> None:
        runs.append((factor, clip))
        first = ("null",) if factor is None else ("pointer", factor)
        params = [("pointer", x), first, ("f32", clip or 0.0), ("pointer", out[0])]
        launch.launch(0xF00, 1, 32, 0, params)

    call = demo_of_defaults._on_cuda
    for args in [(x,), (x, None), (x, None, None), (x, factor), (x, None, 2.0), (x, factor, 2.0)]:
        y = call(*args)
        again = call(*args)
        got = driver.launched[-1]
        at = factor.data_ptr() if len(args) > 1 and args[1] is factor else 0
        assert (got.number(1), got.number(3)) == (at, again.data_ptr()), y
        assert bytes(got.bytes[2])[:4] == struct.pack("<f", 2.0 if args[2:] == (2.0,) else 0.0)
    assert len(runs) == 4  # the first three are one site


@on_stub_with_graphquant
def test_an_eager_call_on_one_tensor_twice_does_not_bind_the_next_to_it(driver: Driver) -> None:
    import torch

    from graphquant.ops import define

    launch, (x, gamma, bias, *_) = watching()
    driver.sizes(8, 8, 4, 8, 8, 8)
    define.stream_of = launch.stream_of
    torch.cuda.current_device = lambda: None
    op, runs = demo(launch)
    op._on_cuda(x, x, 1.0, gamma)
    for _ in range(2):
        op._on_cuda(x, bias, 1.0, gamma)
        got = driver.launched[-1]
        assert [got.number(i) for i in (0, 1, 3)] == [t.data_ptr() for t in (x, bias, gamma)]
    assert len(runs) == 2
