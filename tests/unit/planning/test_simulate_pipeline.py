"""Pipeline schedules: closed forms, and a slow simulation written apart."""

import heapq
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hbp.planning.core.pipeline import makespan, run_pipeline, stage_orders
from megatron_hbp.planning.cost.memory import in_flight

SECONDS = st.integers(0, 9)


@pytest.mark.parametrize(("p", "m"), [(1, 5), (2, 2), (4, 4), (4, 9), (8, 32), (4, 2)])
def test_equal_micro_batches_have_the_bubble_of_1f1b(p, m):
    forward, backward = np.full((2, m), 1.0), np.full((2, m), 2.0)
    work = 3 * m / p
    assert makespan(forward, backward, num_stages=p) == pytest.approx(work * (1 + (p - 1) / m))


@pytest.mark.parametrize(("p", "m", "v"), [(2, 2, 2), (4, 8, 2), (4, 4, 3), (4, 16, 4), (8, 16, 2)])
def test_interleaving_divides_the_bubble_by_the_chunks(p, m, v):
    forward, backward = np.full((1, m), 1.0), np.full((1, m), 2.0)
    work = 3 * m / p
    found = makespan(forward, backward, num_stages=p, num_chunks=v)
    assert found == pytest.approx(work * (1 + (p - 1) / (m * v)))


def events_1f1b(forward, backward, p, hop):
    """Stages as state machines: a stage owes a forward while fewer than p - stage micro-batches are in flight."""
    m = len(forward)
    arrived_forward = [{} for _ in range(p)]  # stage -> micro-batch -> when its input is there
    arrived_backward = [{} for _ in range(p)]
    arrived_forward[0] = dict.fromkeys(range(m), 0)
    done = [[0, 0] for _ in range(p)]
    idle_since = [0] * p
    running = [False] * p
    heap, end = [], 0

    def wake(stage):
        forwards, backwards = done[stage]
        if running[stage] or backwards == m:
            return
        owes_forward = forwards < min(backwards + p - stage, m)
        batch = forwards if owes_forward else backwards
        inbox = (arrived_forward if owes_forward else arrived_backward)[stage]
        if batch not in inbox:
            return
        start = max(idle_since[stage], inbox[batch])
        running[stage] = True
        heapq.heappush(heap, (start + (forward if owes_forward else backward)[batch], stage, owes_forward, batch))

    wake(0)
    while heap:
        now, stage, was_forward, batch = heapq.heappop(heap)
        end = max(end, now)
        running[stage], idle_since[stage] = False, now
        done[stage][0 if was_forward else 1] += 1
        if was_forward and stage == p - 1:
            arrived_backward[stage][batch] = now
        elif was_forward:
            arrived_forward[stage + 1][batch] = now + hop[batch]
        elif stage:
            arrived_backward[stage - 1][batch] = now + hop[batch]
        for other in range(p):
            wake(other)
    assert done == [[m, m]] * p
    return end


@st.composite
def unequal(draw, multiple=1):
    p = draw(st.integers(1, 5))
    m = draw(st.integers(1, 3)) * p if multiple > 1 else draw(st.integers(1, 9))
    columns = [draw(st.lists(SECONDS, min_size=m, max_size=m)) for _ in range(3)]
    return p, *columns


@settings(max_examples=150, deadline=None)
@given(unequal())
def test_1f1b_agrees_with_events(case):
    p, forward, backward, hop = case
    found = makespan(
        p * np.array([forward], float), p * np.array([backward], float), num_stages=p, hop=np.array([hop], float)
    )
    assert found[0] == pytest.approx(sum(forward) + sum(backward) if p == 1 else events_1f1b(*case[1:3], p, hop))


def longest_path_interleaved(forward, backward, p, v):
    """Longest path over 'after me on this stage' and 'needs my output', the order built block by block."""
    m = len(forward)
    forwards = [("F", c, b + i) for b in range(0, m, p) for c in range(v) for i in range(p)]
    backwards = [("B", c, b + i) for b in range(0, m, p) for c in reversed(range(v)) for i in range(p)]
    before = {}
    for stage in range(p):
        ahead = min(2 * (p - stage - 1) + (v - 1) * p, m * v)
        order = forwards[:ahead]
        for number, one in enumerate(backwards):
            order = order + forwards[ahead + number : ahead + number + 1] + [one]
        for previous, one in pairwise(order):
            before[stage, one] = (stage, previous)

    @cache
    def end(stage, one):
        kind, chunk, batch = one
        needs = []
        if (stage, one) in before:
            needs.append(before[stage, one])
        if kind == "F" and (stage or chunk):
            needs.append((stage - 1, one) if stage else (p - 1, ("F", chunk - 1, batch)))
        if kind == "B" and (stage, chunk) == (p - 1, v - 1):
            needs.append((stage, ("F", chunk, batch)))
        elif kind == "B":
            needs.append((stage + 1, one) if stage < p - 1 else (0, ("B", chunk + 1, batch)))
        return max((end(*need) for need in needs), default=0) + (forward if kind == "F" else backward)[batch]

    return max(end(stage, backwards[-1]) for stage in range(p))


@settings(max_examples=80, deadline=None)
@given(unequal(multiple=2), st.integers(2, 3))
def test_interleaved_agrees_with_the_longest_path(case, v):
    p, forward, backward, _ = case
    if p == 1:
        return
    chunks = p * v
    found = makespan(
        chunks * np.array([forward], float), chunks * np.array([backward], float), num_stages=p, num_chunks=v
    )
    assert found[0] == pytest.approx(longest_path_interleaved(forward, backward, p, v))


def test_steps_side_by_side_do_not_touch_each_other():
    rng = np.random.default_rng(0)
    forward, backward = rng.random((6, 8)), rng.random((6, 8))
    together = makespan(forward, backward, num_stages=4, num_chunks=2)
    apart = [makespan(f[None], b[None], num_stages=4, num_chunks=2)[0] for f, b in zip(forward, backward, strict=True)]
    assert together.tolist() == apart


def test_every_stage_does_every_pass_once():
    for order in stage_orders(4, 8, 2):
        assert sorted(order) == sorted((b, c, m) for b in (False, True) for c in (0, 1) for m in range(8))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_memory_is_the_worst_window_of_1f1b(p, held):
    grid = p * np.array(held, float)[None, :, None]
    for stage in range(p):
        windows = [sum(held[first : first + p - stage]) for first in range(len(held))]
        assert in_flight(grid, stage=stage, num_stages=p)[0, 0] == pytest.approx(max(windows))


@pytest.mark.parametrize("p", [2, 4])
def test_memory_of_interleaved_stages_is_what_lies_between_forward_and_backward(p):
    m, v = 3 * p, 2
    rng = np.random.default_rng(p)
    held = rng.integers(1, 50, m).astype(float)
    passes = list(run_pipeline(rng.uniform(1, 2, (1, m)), rng.uniform(1, 2, (1, m)), num_stages=p, num_chunks=v))
    for stage in range(p):
        own = [one for one in passes if one.stage == stage]
        ends = {(one.chunk, one.micro_batch): one.end[0] for one in own if one.backward}
        spans = [
            (one.start[0], ends[one.chunk, one.micro_batch], held[one.micro_batch]) for one in own if not one.backward
        ]
        peak = max(sum(size for start, end, size in spans if start <= now < end) for now, _, _ in spans)
        found = in_flight(p * v * held[None, :, None], stage=stage, num_stages=p, num_chunks=v)
        assert found[0, 0] == pytest.approx(peak)
