"""The batcher alone: whatever comes in which order, every row gets its own result, or its own failure."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.serving.batcher import Batcher
from infuse.serving.refusals import RefusedError
from infuse.texts import batches

BAD = 13
"""A token with which no row can be run."""


class Model:
    """Answers a row with its tokens' sum and its adapter; records what it is given."""

    def __init__(self):
        self.passes: list[tuple[list[list[int]], list[str]]] = []

    def __call__(self, tokens, names):
        self.passes.append((tokens, list(names)))
        if any(BAD in ids for ids in tokens):
            raise ValueError("a bad row")
        return [self.right(ids, name) for ids, name in zip(tokens, names, strict=True)]

    @staticmethod
    def right(ids, name):
        return np.array([sum(ids), len(ids), hash(name) % 97])


rows = st.tuples(
    st.lists(st.integers(0, 12) | st.sampled_from([1, 1, 1, BAD]), min_size=1, max_size=9), st.sampled_from("abc")
)
asks = st.tuples(st.lists(rows, min_size=1, max_size=6), st.booleans())
"""Rows of a request, and whether its client goes away."""


@settings(max_examples=60, deadline=None)
@given(
    st.lists(asks, min_size=1, max_size=12), st.integers(1, 40), st.booleans(), st.sampled_from([0, 0.001]),
    st.sampled_from([1, 3]),
)  # fmt: skip
def test_every_row_gets_its_own_result(requests, budget, mixed, window, threads):
    model = Model()
    batcher = Batcher(model, window=window, max_tokens=budget, mixed=mixed, threads=threads)

    async def ask(rows):
        with batcher.reserve(len(rows)):
            return await batcher.run([ids for ids, _ in rows], [name for _, name in rows])

    async def main():
        tasks = [asyncio.create_task(ask(rows)) for rows, _ in requests]
        await asyncio.sleep(0)
        for task, (_, leaves) in zip(tasks, requests, strict=True):
            if leaves:
                task.cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    try:
        results = asyncio.run(main())
    finally:
        assert batcher.drain(10)
    for (rows, leaves), result in zip(requests, results, strict=True):
        if leaves:
            assert isinstance(result, asyncio.CancelledError)
        elif any(BAD in ids for ids, _ in rows):
            assert isinstance(result, ValueError)
        else:
            assert not isinstance(result, BaseException), result
            for got, (ids, name) in zip(result, rows, strict=True):
                np.testing.assert_array_equal(got, Model.right(ids, name))
    assert batcher.reserved == 0 and not batcher.queue
    for tokens, names in model.passes:
        assert len(tokens) == 1 or len(tokens) * max(map(len, tokens)) <= budget
        assert mixed or len(set(names)) == 1


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 60))
def test_batches_hold_every_row_once_and_no_more_than_the_budget(lengths, budget):
    parts = list(batches([[0] * length for length in lengths], budget))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget for part in parts)


def test_one_bad_row_fails_alone():
    model, gate = Model(), threading.Event()
    batcher = Batcher(model, window=0)
    batcher.call(lambda: gate.wait(10))

    async def main():
        asked = [asyncio.create_task(batcher.run([[BAD if i == 5 else i]], ["a"])) for i in range(12)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(main())
    assert [isinstance(result, ValueError) for result in results] == [i == 5 for i in range(12)]
    assert len(model.passes[0][0]) == 12 and len(model.passes) <= 2 * 4 + 1  # halves, not one by one
    assert batcher.drain(5)


def test_waiting_rows_share_a_pass_whatever_their_adapters():
    model = Model()
    batcher = Batcher(model, window=0.2, max_tokens=100)

    async def main():
        await asyncio.gather(*(batcher.run([[1, 2]], [name]) for name in "abcabc"))
        return time.monotonic()

    asyncio.run(main())
    assert [sorted(names) for _, names in model.passes] == [list("aabbcc")]
    assert batcher.drain(5)


def test_a_full_batch_waits_for_nobody():
    batcher = Batcher(Model(), window=60, max_tokens=8)

    async def main():
        await asyncio.wait_for(asyncio.gather(*(batcher.run([[1, 2]], ["a"]) for _ in range(4))), 10)

    asyncio.run(main())
    assert batcher.drain(5)


def meeting():
    """A model whose passes wait for another one to run beside them."""
    both = threading.Barrier(2)

    def forward(tokens, names):
        both.wait(10)
        return [np.array([1.0])] * len(names)

    return forward


def test_threads_run_passes_at_the_same_time():
    batcher = Batcher(meeting(), window=0, threads=2)

    async def main():
        first = asyncio.create_task(batcher.run([[1]], ["a"]))
        await asyncio.sleep(0.05)
        return await asyncio.wait_for(asyncio.gather(first, batcher.run([[2]], ["b"])), 10)

    assert len(asyncio.run(main())) == 2
    assert batcher.drain(5)


def test_rows_that_a_full_pass_leaves_go_to_another_thread():
    batcher = Batcher(meeting(), window=0, max_tokens=2, threads=2)
    gate = threading.Event()
    for _ in range(2):
        batcher.call(lambda: gate.wait(10))

    async def main():
        asked = asyncio.create_task(batcher.run([[1, 2], [3, 4]], ["a", "a"]))
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.wait_for(asked, 10)

    asyncio.run(main())
    assert batcher.drain(5)


def test_rows_of_the_departed_are_never_run():
    model, gate = Model(), threading.Event()
    batcher = Batcher(model, window=0)
    batcher.call(lambda: gate.wait(10))

    async def main():
        asked = [asyncio.create_task(batcher.run([[i]], ["a"])) for i in range(4)]
        await asyncio.sleep(0)
        asked[1].cancel()
        await asyncio.gather(asked[1], return_exceptions=True)
        gate.set()
        await asyncio.gather(asked[0], *asked[2:])

    asyncio.run(main())
    assert sorted(ids[0] for tokens, _ in model.passes for ids in tokens) == [0, 2, 3]
    assert batcher.drain(5)


def test_places_are_given_back_and_refused_beyond_the_capacity():
    batcher = Batcher(Model(), capacity=4)
    with batcher.reserve(10):  # an empty queue takes any request that the limits let in
        with pytest.raises(RefusedError) as refused, batcher.reserve(1):
            pass
        assert refused.value.status == 429 and refused.value.retry_after >= 1
    with batcher.reserve(3), batcher.reserve(1):
        with pytest.raises(RefusedError), batcher.reserve(1):
            pass
        assert batcher.reserved == 4
    assert batcher.reserved == 0
    with pytest.raises(KeyError), batcher.reserve(2):
        raise KeyError
    assert batcher.reserved == 0 and batcher.drain(5)


def test_jobs_run_between_passes_in_order_and_never_starve_them():
    model, order = Model(), []
    batcher = Batcher(model, window=0)

    async def main():
        def again(left):
            order.append(("job", left, len(model.passes)))
            if left:
                batcher.call(lambda: again(left - 1))

        batcher.call(lambda: again(200))
        await asyncio.wait_for(asyncio.gather(*(batcher.run([[i % 9]], ["a"]) for i in range(50))), 10)

    asyncio.run(main())
    done = batcher.call(lambda: len(order))
    assert done.result(10) <= 201
    assert [left for _, left, _ in order] == sorted((left for _, left, _ in order), reverse=True)
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda: 1 / 0).result(10)
    assert batcher.call(lambda: 3).result(10) == 3
    assert batcher.drain(5)


def test_draining_answers_what_waits_and_refuses_what_comes():
    model, gate = Model(), threading.Event()
    batcher = Batcher(model, window=60)
    batcher.call(lambda: gate.wait(10))

    async def main():
        waiting = asyncio.create_task(batcher.run([[1]], ["a"]))
        await asyncio.sleep(0)
        drained = asyncio.create_task(asyncio.to_thread(batcher.drain, 10))
        while not batcher.stopping:
            await asyncio.sleep(0.001)
        with pytest.raises(RefusedError) as refused, batcher.reserve(1):
            pass
        assert refused.value.status == 503
        gate.set()
        assert await waiting and await drained
        with pytest.raises(RefusedError):
            await batcher.run([[1]], ["a"])

    asyncio.run(asyncio.wait_for(main(), 20))
    with pytest.raises(RefusedError):
        batcher.call(lambda: 1).result(1)


def test_a_pass_that_hangs_is_not_waited_for_beyond_the_time():
    gate = threading.Event()
    batcher = Batcher(lambda *_: gate.wait(10) and [])
    batcher.call(lambda: gate.wait(10))
    started = time.monotonic()
    assert not batcher.drain(0.05)
    assert time.monotonic() - started < 5
    gate.set()
    assert batcher.drain(5)
