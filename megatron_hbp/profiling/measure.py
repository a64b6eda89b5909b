"""One micro-batch on all ranks, timed and weighed; memory that runs out on one rank ends the row on all of them."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hbp.feed.feed import Feed
from megatron_hbp.feed.forward import make_forward_step
from megatron_hbp.planning.cost.profile_memory import over_limit
from megatron_hbp.planning.cost.profile_table import Measurement, Setting
from megatron_hbp.profiling.packs import plan_of_one_pack
from megatron_hbp.profiling.session import Session

LEAST_REPEATS, MOST_REPEATS = 4, 10
"""The paper times 3 to 10 iterations; on two cores medians of 3 have a standard deviation of 5%, of 5 3%."""


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "cuda calloc")
"""In errors of CUDA, Triton and torch's CPU allocator, cuBLAS, NCCL (lower case)."""


class DoesNotFitError(Exception):
    """A rank ran out of memory and all ranks know."""


class RanksStuckError(Exception):
    """This rank ran out of memory in the middle of an exchange, the others wait for it there: start all anew."""


def measure(session: Session, setting: Setting, *, is_warm: bool) -> Measurement:
    """One row. Collective over the world. Raises RanksStuckError.

    Threads, rotary tables and libraries are made at first use and belong to no row: where nothing has run yet
    (`is_warm` is False), one run more goes before.
    """
    feed = session.feed(plan_of_one_pack(setting.sample_lengths(), setting.tier, session.num_ranks))
    # weighing on CPU takes torch's profiler, two to three runs' time; several samples hold what one of their sum holds
    is_weighed = session.on_cuda or setting.shape == "one"
    peak = saved = None
    try:
        if not is_warm:
            time_repeats(session, feed, repeats=1)
        if is_weighed:
            peak, saved = weigh(session, feed)
        else:
            time_repeats(session, feed, repeats=1)  # warm-up
        times = time_repeats(session, feed)
    except DoesNotFitError:
        return refused(setting, "out of memory")
    finally:
        _release(session)
    low, median, high = np.percentile(times, (25, 50, 75))
    spread = agree(session, False, float((high - low) / median))  # the largest of a rank
    seconds = gangs_by_rank(session, times).reshape(-1, setting.cp_degree).max(axis=1)  # a gang: its slowest rank
    why = over_limit(peak, session.memory_limit)
    return replace(
        refused(setting, why), seconds=float(np.median(seconds)), repeats=len(times), spread=spread, peak_bytes=peak,
        saved_bytes=saved, fits=not why,
    )  # fmt: skip


def refused(setting: Setting, why: str) -> Measurement:
    """The row of a setting that does not fit."""
    return Measurement(
        tokens=setting.tokens, cp_degree=setting.cp_degree, recompute=setting.recompute, shape=setting.shape,
        squares=setting.squares, seconds=None, repeats=0, spread=0.0, peak_bytes=None, fits=False, why=why,
    )  # fmt: skip


def weigh(session: Session, feed: Feed) -> tuple[int, int | None]:
    """(peak, saved) bytes of the fullest rank, saved on CPU alone; this is the warm-up too. Raises DoesNotFitError."""
    session.clear_gradients()
    peak, saved = _unless_out_of_memory(session, reserved_peak if session.on_cuda else allocated_peak, feed) or (
        None,
        0,
    )
    most = agree(session, peak is None, peak or 0)
    return int(most), None if session.on_cuda else int(agree(session, False, saved))


def time_repeats(session: Session, feed: Feed, repeats: int | None = None) -> list[float]:
    """Seconds of this rank in each repeat: as many as fill the row's seconds. Raises DoesNotFitError."""
    times: list[float] = []
    num_repeats = repeats or MOST_REPEATS
    while len(times) < num_repeats:
        session.clear_gradients()
        begun = time.perf_counter()
        seconds = _unless_out_of_memory(session, _seconds, feed)
        # Ranks start each repeat together: a rank that runs ahead would be timed with fewer neighbours.
        slowest = agree(session, seconds is None, time.perf_counter() - begun)
        times.append(seconds or 0.0)
        if repeats is None and len(times) == 1:
            num_repeats = int(np.clip(session.options.seconds / slowest, LEAST_REPEATS, MOST_REPEATS))
    return times


def gangs_by_rank(session: Session, times: list[float]) -> np.ndarray:
    """Median seconds [data-parallel ranks] of the whole depth of the model. Collective over the world.

    On CUDA the time from the first event to the last holds all pipeline stages; process CPU times of stages add up.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mine = parallel_state.get_data_parallel_rank(), stage, float(np.median(times))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine, group=session.control)
    stages = np.zeros((session.header.layout["pipeline_parallel"], session.num_ranks))
    for rank, stage, median in every:
        stages[stage, rank] = max(stages[stage, rank], median)
    return stages.max(axis=0) if session.on_cuda else stages.sum(axis=0)


# ---------------------------------------------------------------- agreement


def agree(session: Session, failed: bool, value: float = 0.0) -> float:
    """The largest `value` of all ranks. Raises DoesNotFitError where any rank `failed`, on all ranks.

    The one collective of a row outside the model: whichever call a rank is at, its next one meets the others' next.

    Raises:
        RanksStuckError: this rank failed and the others don't come: they wait for it in an exchange.
    """
    # double: bytes of a large device exceed what fp32 can count
    flags = torch.tensor([float(failed), value], dtype=torch.float64)
    work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=session.control, async_op=True)
    assert work is not None
    try:
        work.wait(timedelta(seconds=session.options.patience if failed else 0))  # 0: as long as the group's timeout
    except RuntimeError as error:
        if failed:
            raise RanksStuckError from error
        raise
    if flags[0]:
        raise DoesNotFitError
    return float(flags[1])


def _unless_out_of_memory[T](session: Session, run: Callable[..., T], *args: Any) -> T | None:
    """run(session, *args), or None where a device, torch's CPU allocator, numpy or Python runs out of memory."""
    try:
        return run(session, *args)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            raise
    _release(session)
    return None


def _release(session: Session) -> None:
    """Let go of what an interrupted forward or backward holds."""
    gc.collect()
    if session.on_cuda:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- one run


def _seconds(session: Session, feed: Feed) -> float:
    """Device seconds on CUDA; elsewhere CPU seconds of this process and its threads, at the yardstick's speed."""
    if session.yardstick is not None:
        before, begun = session.yardstick.read(), time.process_time()
        session.forward_backward(feed)
        spent = time.process_time() - begun
        return session.yardstick.corrected(spent, before, session.yardstick.read())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(session.runtime.device)
    start.record()
    session.forward_backward(feed)
    end.record()
    torch.cuda.synchronize(session.runtime.device)
    return start.elapsed_time(end) / 1e3


def reserved_peak(session: Session, feed: Feed) -> tuple[float, float]:
    """(bytes that the allocator reserved at most, and what lies outside it, 0) of one run on a device."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(session.runtime.device)
    session.forward_backward(feed)
    torch.cuda.synchronize(session.runtime.device)
    free, total = torch.cuda.mem_get_info(session.runtime.device)
    outside = total - free - torch.cuda.memory_reserved(session.runtime.device)
    return float(torch.cuda.max_memory_reserved(session.runtime.device) + outside), 0.0


FORWARD_DONE = "hbp profile: forward done"


def allocated_peak(session: Session, feed: Feed) -> tuple[float, float]:
    """(highest sum of what torch's CPU allocator gave and took back, that sum between forward and backward) of one run.

    Hooks on saved tensors would tell the second as well, and keep tensors alive that are free without them.
    """
    plain = make_forward_step()

    def forward_step(data_iterator: Any, model: Any) -> Any:
        result = plain(data_iterator, model)
        with torch.profiler.record_function(FORWARD_DONE):
            return result

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        session.forward_backward(feed, forward_step)
    held = peak = saved = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == FORWARD_DONE:
            saved = max(saved, held)
    return float(peak), float(saved)
