# SPDX-License-Identifier: Apache-2.0
"""The prefetching loader: the batches of a direct call, made ahead and not further, whatever the order, errors and ends."""

import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scm_core.data import BatchOrder
from scm_core.data import loader as loader_module
from scm_core.data.loader import Prefetcher
from scm_core.nn.build import build_network
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.seeds import generator_for
from scm_core.train.loop import train
from scm_core.train.state import TrainSettings, TrainState

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds that a thread has for what takes it none: a busy machine is no failure


def at(iteration: int) -> Batch:
    """Random data in an order with epochs, as training has them."""
    indices = BatchOrder(10, 4, seed=1).indices(iteration)
    return Batch(torch.randn(4, 2, 3, 3, generator=generator_for(0, "data", iteration)), indices % 3, indices)


def assert_same(got: Batch, expected: Batch) -> None:
    for name in Batch._fields:
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


def numbered(iteration: int) -> Batch:
    """A batch that says which one it is."""
    return Batch(torch.full((1, 1), float(iteration)), None, torch.tensor([iteration]))


def waited_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_any_order_gives_what_a_direct_call_gives(depth: int) -> None:
    """In sequence, skipping, repeating, back to the start, far ahead: bit for bit the batch of the iteration."""
    draw = random.Random(depth)
    order = [*range(8), 8, 8, 10, 13, 12, 0, 1, 2, 500, 501, 3, *(draw.randrange(12) for _ in range(150))]
    with Prefetcher(at, depth=depth) as batches:
        for iteration in order:
            assert_same(batches(iteration), at(iteration))


def test_unlabelled_data_stay_unlabelled() -> None:
    with Prefetcher(numbered) as batches:
        assert_same(batches(0), numbered(0))


@pytest.mark.parametrize("depth", [0, 2])
def test_x0_and_labels_go_to_the_device_and_the_indices_stay(depth: int) -> None:
    with Prefetcher(at, "meta", depth) as batches:
        batch = batches(3)
        assert (batch.x0.device.type, batch.x0.shape) == ("meta", (4, 2, 3, 3))
        assert batch.labels is not None
        assert batch.labels.device.type == "meta"
        assert torch.equal(batch.indices, at(3).indices)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_as_many_are_made_ahead_as_asked_for(depth: int) -> None:
    """While the caller works on k, k + 1 … k + depth are made, each once, and none beyond."""
    made: list[int] = []

    def counted(iteration: int) -> Batch:
        made.append(iteration)
        return numbered(iteration)

    with Prefetcher(counted, depth=depth) as batches:
        for iteration in range(3):
            batches(iteration)
            assert waited_for(lambda: len(made) > iteration + depth)  # noqa: B023 - called at once
            time.sleep(0.02)
            assert made == list(range(iteration + depth + 1))


def test_one_thread_makes_all_batches() -> None:
    """Never two at a time, so that what `at` caches needs no lock; without a depth it is the caller's."""
    threads: set[int] = set()

    def noted(iteration: int) -> Batch:
        threads.add(threading.get_ident())
        return numbered(iteration)

    with Prefetcher(noted) as batches:
        for iteration in (0, 1, 7, 3, 4):
            batches(iteration)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    threads.clear()
    Prefetcher(noted, depth=0)(0)
    assert threads == {threading.get_ident()}


def test_what_a_jump_left_behind_is_not_served() -> None:
    """The batch that is being made when the caller jumps away is dropped, and made again when it is asked for."""
    begun, gate, made = threading.Event(), threading.Event(), []

    def slow(iteration: int) -> Batch:
        made.append(iteration)
        if made == [0, 1]:
            begun.set()
            assert gate.wait(PATIENCE)
        return Batch(torch.tensor([[float(iteration), float(len(made))]]), None, torch.tensor([iteration]))

    with Prefetcher(slow, depth=1) as batches:
        batches(0)
        assert begun.wait(PATIENCE)
        threading.Timer(0.05, gate.set).start()
        assert batches(10).x0[0, 0] == 10
        assert batches(1).x0[0, 0] == 1
    assert made[:3] == [0, 1, 10]
    assert made.count(1) == 2


def test_an_interrupted_wait_leaves_nothing_behind() -> None:
    """Ctrl-C while it waits after a jump: the iteration that was being made before the jump can be had all the same."""
    begun, gate = threading.Event(), threading.Event()

    def slow(iteration: int) -> Batch:
        if iteration == 1 and not gate.is_set():
            begun.set()
            assert gate.wait(PATIENCE)
        return numbered(iteration)

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Prefetcher(slow, depth=1) as batches:
            batches(0)
            assert begun.wait(PATIENCE)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                batches(10)
            threading.Timer(0.05, gate.set).start()
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            assert batches(1).x0.item() == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Broken(Exception):
    """What a data source raises."""


def test_an_exception_comes_at_the_call_of_its_iteration() -> None:
    """Not earlier, of its own type, with the traceback of the thread; what comes after it can be had, and it again."""

    def breaks_at_three(iteration: int) -> Batch:
        if iteration == 3:
            raise Broken("sample 17")
        return numbered(iteration)

    with Prefetcher(breaks_at_three, depth=5) as batches:
        for iteration in (0, 1, 2):
            assert batches(iteration).x0.item() == iteration
        for _ in range(2):
            with pytest.raises(Broken, match="sample 17") as caught:
                batches(3)
            names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
            assert names[-1] == "breaks_at_three"
        assert batches(4).x0.item() == 4
        assert batches(0).x0.item() == 0
        assert batches(5).x0.item() == 5  # past the one that breaks


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    with Prefetcher(numbered) as batches:
        batches(0)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    batches.close()  # a second time: nothing
    with pytest.raises(ValueError, match=r"iteration: expected no call after close\(\), got 1"):
        batches(1)

    def leaves() -> None:
        with Prefetcher(numbered) as batches:
            batches(0)
            raise Broken

    with pytest.raises(Broken):
        leaves()
    assert threading.active_count() == before
    with Prefetcher(numbered):  # never called: no thread
        assert threading.active_count() == before


def test_closing_does_not_wait_for_a_read_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns after the grace; the thread makes nothing more once the read comes back."""
    monkeypatch.setattr(loader_module, "GRACE_S", 0.1)
    begun, gate, made = threading.Event(), threading.Event(), []

    def hangs(iteration: int) -> Batch:
        made.append(iteration)
        if iteration == 1:
            begun.set()
            assert gate.wait(PATIENCE)
        return numbered(iteration)

    before = threading.active_count()
    batches = Prefetcher(hangs)
    batches(0)
    assert begun.wait(PATIENCE)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < PATIENCE / 2
    gate.set()
    assert waited_for(lambda: threading.active_count() == before)
    assert made == [0, 1]


def test_no_batch_outlives_its_use() -> None:
    """What is alive is what was made ahead: neither thread nor queue keep a batch that was handed over or passed by."""
    made: dict[int, weakref.ref[torch.Tensor]] = {}

    def tracked(iteration: int) -> Batch:
        batch = numbered(iteration)
        made[iteration] = weakref.ref(batch.x0)
        return batch

    with Prefetcher(tracked, depth=2) as batches:
        for iteration in (0, 1, 2, 4, 5):
            batches(iteration)
        assert waited_for(lambda: 7 in made)  # 3 may have been passed by before it was made
        assert waited_for(lambda: {k for k, x0 in made.items() if x0() is not None} == {6, 7})
    assert waited_for(lambda: not any(x0() is not None for x0 in made.values()))


def test_the_threads_do_not_keep_the_process() -> None:
    """A process that ends without closing ends at once, with status 0: one thread waits, another is in a read that hangs for ever."""
    code = """
import threading, torch
from scm_core.data.loader import Prefetcher
from scm_core.objectives import Batch
hanging = threading.Event()
def waits(k):
    return Batch(torch.zeros(1), None, torch.zeros(1))
def hangs(k):
    if k == 1:
        hanging.set()
        threading.Event().wait()
    return waits(k)
one, other = Prefetcher(waits), Prefetcher(hangs)
one(0), other(0)
print(hanging.wait())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="depth: expected a number of batches >= 0, got -1"):
        Prefetcher(at, depth=-1)


def test_training_is_the_same_with_it() -> None:
    """Weights after some steps, bit for bit, whether batches come from the loader or from its function."""

    def trained(data: Callable[[int], Batch]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = build_network(
            {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 1}
        )
        head = LogVarHead(0.0)
        state = TrainState(net, TrainSettings(12, 4, 1e-2, 0, ema_sigma_rel=0.1), {"logvar": head})
        train(state, DiffusionObjective(net, head, 0.5, -0.4, 1.2), data)
        return [*net.parameters(), *head.parameters(), *state.averaged().values()]

    def images(iteration: int) -> Batch:
        return at(iteration)._replace(x0=torch.randn(4, 2, 4, 4, generator=generator_for("x0", iteration)))

    direct = trained(images)
    with Prefetcher(images) as batches:
        loaded = trained(batches)
    assert all(torch.equal(a, b) for a, b in zip(direct, loaded, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_copy_is_used_before_it_is_done_or_overwritten_while_in_use() -> None:
    """Batches that take long to copy, used by kernels that take long, their memory freed at once: the sums are the direct calls'."""

    def large(iteration: int) -> Batch:
        x0 = torch.randn(64, 4, 256, 256, generator=generator_for(iteration))
        return Batch(x0, torch.full((64,), iteration), torch.arange(64))

    sums = []
    other = torch.randn(4096, 4096, device="cuda")
    with Prefetcher(large, "cuda") as batches:
        for iteration in range(12):
            batch = batches(iteration)
            assert batch.x0.is_cuda
            assert not batch.indices.is_cuda
            for _ in range(20):
                other = (other @ other).clamp(-1, 1)
            assert batch.labels is not None
            sums.append((batch.x0.double().sum(), batch.x0.double().square().sum(), batch.labels.sum()))
            del batch
    torch.cuda.synchronize()
    for iteration, (total, squares, labels) in enumerate(sums):
        expected = large(iteration)
        assert total.item() == pytest.approx(expected.x0.double().sum().item(), rel=1e-9)
        assert squares.item() == pytest.approx(expected.x0.double().square().sum().item(), rel=1e-9)
        assert labels.item() == 64 * iteration
