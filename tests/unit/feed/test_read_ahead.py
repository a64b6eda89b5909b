"""Reading ahead changes nothing of what is read: order, errors, ends, positions."""

import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_hbp.feed import feed as feeds
from megatron_hbp.feed.feed import Feed
from megatron_hbp.feed.read_ahead import ReadAhead
from megatron_hbp.feed.transfer import moved
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.tiers import Tier
from tests.equivalence.support.plans import MemoryStore, plan_of

LENGTHS = [30, 9, 25, 3, 17, 28, 40, 5]
TIERS = (Tier(packing_length=32), Tier(packing_length=64, cp_degree=2, layout="zigzag"))
PACKS = [
    (0, 0, 0, 1, [0, 1]), (0, 1, 0, 0, [2, 3]), (0, 1, 1, 0, [4]), (1, 0, 0, 0, [5]),
    (2, 0, 0, 1, [6]), (2, 1, 1, 0, [7]),
]  # fmt: skip


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_items_in_order_and_no_more_ahead_than_asked_for():
    made = []

    def items():
        for index in range(10):
            made.append(index)
            yield index

    reader = ReadAhead(items(), 3)
    assert made == []  # nothing before it is asked for
    assert next(reader) == 0
    assert until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one taken, three ready
    assert list(reader) == list(range(1, 10)) and list(reader) == []
    assert reader.waited > 0


def test_an_error_comes_in_its_turn_with_its_traceback():
    def items():
        yield 1
        breaks_here()

    def breaks_here():
        raise ValueError("bad sample")

    reader = ReadAhead(items(), 2)
    assert next(reader) == 1
    for _ in range(2):  # and again: it does not turn into an end, or a wait for ever
        with pytest.raises(ValueError, match="bad sample") as raised:
            next(reader)
        assert "breaks_here" in "".join(traceback.format_tb(raised.value.__traceback__))


def test_closed_and_dropped_readers_end_their_threads():
    def endless():
        while True:
            yield 0

    closed, dropped = ReadAhead(endless(), 2), ReadAhead(endless(), 2)
    assert not closed._pool._threads  # they begin with the first item
    assert next(closed) == next(dropped) == 0
    threads = [thread for r in (closed, dropped) for thread in r._pool._threads]
    closed.close()
    closed.close()
    with pytest.raises(StopIteration):
        next(closed)
    del dropped
    assert until(lambda: not any(thread.is_alive() for thread in threads))
    ReadAhead(endless(), 1).close()  # never started


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_program_ends_while_its_reader_waits_for_room(ending):
    program = (
        "import itertools; from megatron_hbp.feed.read_ahead import ReadAhead\n"
        f"reader = ReadAhead(itertools.count(), 2); next(reader)\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True, text=True)
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1}[ending]


def feed_of(rank=0, store=None, **settings) -> Feed:
    store = store or MemoryStore.random(LENGTHS, vocabulary=50)
    plan = plan_of(PACKS, tiers=TIERS, lengths=np.array(LENGTHS), num_ranks=2)
    groups = CpGroups(by_degree={2: "pair"}, num_created=0)  # type: ignore[dict-item]
    settings = {"unit": 1, "full_length": False, "device": torch.device("cpu")} | settings
    return Feed(plan=plan, store=store, groups=groups, rank=rank, **settings)  # type: ignore[arg-type]


def seen(micro_batch):
    """Everything in a micro-batch, tensors as lists."""
    tensors = []

    def take(tensor):
        tensors.append(tensor.tolist())
        return tensor

    moved(micro_batch, take)
    return micro_batch.step, micro_batch.slot, micro_batch.tier, tensors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_feed_that_reads_ahead_is_the_same_feed(rank):
    plain = [seen(each) for each in feed_of(rank)]
    ahead = feed_of(rank, read_ahead=3)
    assert [seen(each) for each in ahead] == plain and ahead.waited > 0
    assert feed_of(rank).waited == 0


def test_what_was_read_ahead_but_not_taken_is_read_again_after_a_resume():
    stopped = feed_of(read_ahead=4)
    first = [seen(next(stopped)) for _ in range(2)]  # step 0 is trained, steps 1 and 2 are ready
    stopped.close()
    resumed = feed_of(read_ahead=4, first_step=1)
    assert first + [seen(each) for each in resumed] == [seen(each) for each in feed_of()]


def test_every_tensor_of_a_micro_batch_is_moved():
    micro_batch = next(feed_of())
    there = moved(micro_batch, lambda tensor: tensor.to("meta"))
    devices = []

    def take(tensor):
        devices.append(tensor.device.type)
        return tensor

    moved(there, take)
    assert set(devices) == {"meta"} and len(devices) > 15
    assert there.context.split.shared.ranges[1].segments.cu_q.device.type == "meta"
    assert there.context.cp_group == "pair" and there.context.split.shared.segments.q == (0, 30, 39)


def test_the_node_asks_for_what_its_ranks_read_in_order_and_once():
    store = MemoryStore.random(LENGTHS, vocabulary=50)
    asked = []
    will_need = SimpleNamespace(sample=store.sample, will_need=lambda ids: asked.append(sorted(ids.tolist())))
    both = feed_of(store=will_need, node_ranks=[0, 1])
    next(both)
    assert asked == [[0, 1, 2, 3, 4], [5], [6, 7]]  # the step at hand and two more
    list(both)
    assert len(asked) == 3 and feeds.STEPS_AHEAD == 2
    asked.clear()
    list(feed_of(store=will_need, node_ranks=[1]))
    assert asked == [[0, 1, 4], [6, 7]]  # its part, packs shared with another node included
    asked.clear()
    list(feed_of(store=will_need))
    assert asked == []
    assert threading.active_count() < 20
