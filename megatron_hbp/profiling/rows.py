"""Row by row: from a model to a profile table, a fitted cost model and its errors."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_hbp.errors import DataError, HbpError, StopRequested, everywhere
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.fit import ProfileFit, fit_profile
from megatron_hbp.planning.cost.profile_memory import predict_fit, with_limit
from megatron_hbp.planning.cost.profile_table import ProfileTable, Setting
from megatron_hbp.profiling.check import check_plan, load_plan
from megatron_hbp.profiling.grid import settings
from megatron_hbp.profiling.measure import RanksStuckError, measure, refused
from megatron_hbp.profiling.options import PROGRAM, ProfileOptions
from megatron_hbp.profiling.progress import progress
from megatron_hbp.profiling.session import Session, build
from megatron_hbp.report.profile_tables import print_fit
from megatron_hbp.runtime.checks import feed_unit
from megatron_hbp.runtime.program import fail


def profile(args: Any, options: ProfileOptions) -> ProfileTable:
    """Measure what the table lacks, fit, write both files. Collective over the world.

    Args:
        args: Megatron-LM's arguments.
        options: ours.

    Raises:
        HbpError: a mistake in flags, a table of another model or machine, a file that can't be written.
        StopRequested: ranks wait for each other after one ran out of memory; the row is noted, start again to go on.
    """
    session = build(args, options)
    plan = _from_rank_0(session, partial(load_plan, session, options.check)) if options.check is not None else None
    table = _fill(session, _begin(session))
    fitted: list[Any] = [_fit(table, options) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(fitted, src=0, group=session.control)
    if plan is not None and options.check is not None and fitted[0] is not None:
        check_plan(session, plan, options.check, fitted[0].cost)
    return table


def _begin(session: Session) -> ProfileTable:
    """The table as it is on disk, or an empty one; rank 0 reads, all get the same."""
    table: ProfileTable = _from_rank_0(session, partial(_open, session.options, session))
    if session.yardstick is not None and table.yardstick is not None:
        session.yardstick.reference = table.yardstick
    return table


def _from_rank_0(session: Session, read: Callable[[], Any]) -> Any:
    """What `read` returns on rank 0; a known error ends all ranks in one line. Collective over the world."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [read()]
        except HbpError as error:
            result = [error]
    dist.broadcast_object_list(result, src=0, group=session.control)
    if isinstance(result[0], HbpError):
        raise everywhere(result[0])
    return result[0]


def _open(options: ProfileOptions, session: Session) -> ProfileTable:
    speed = session.yardstick.reference if session.yardstick is not None else None
    table = ProfileTable(header=session.header, memory_limit=session.memory_limit, yardstick=speed)
    if options.out.exists():
        found = profile_table.load(options.out)
        profile_table.check_header(found.header, session.header, options.out)
        table = with_limit(found, session.memory_limit)
    if options.failure_note.exists():
        tokens, degree, recompute, shape = options.failure_note.read_text(encoding="utf-8").split()
        failed: Any = Setting(tokens=int(tokens), cp_degree=int(degree), recompute=recompute, shape=shape)  # type: ignore[arg-type]
        table = table.with_row(refused(failed, "out of memory on one rank, the others were in an exchange"))
    profile_table.save(table, options.out)  # a place that can't be written is reported now, not after an hour
    options.failure_note.unlink(missing_ok=True)
    return table


def _fill(session: Session, table: ProfileTable) -> ProfileTable:
    """Run or refuse every setting that the table lacks; the file is whole after each row."""
    options = session.options
    every = settings(
        options.lengths, session.degrees, session.policies, unit=feed_unit(session.runtime.args),
        most_local=options.most_local,
    )  # fmt: skip
    missing = [setting for setting in every if table.find(setting) is None]
    is_warm = False
    with progress(every, missing, table.header.model, show=dist.get_rank() == 0) as advance:
        for setting in missing:
            if why := predict_fit(table, setting).refused:
                row = refused(setting, why)
            else:
                try:
                    row, is_warm = measure(session, setting, is_warm=is_warm), True
                except RanksStuckError:
                    _stop(options, setting)
                except RuntimeError:
                    if options.failure_note.exists():  # a rank out of memory has left; the launcher ends this one
                        time.sleep(30)
                        fail(StopRequested("a rank ran out of memory; its row is noted"), PROGRAM)  # on another node
                    raise
            table = table.with_row(row)
            if dist.get_rank() == 0:
                profile_table.save(table, options.out)
            advance(row)
    return table


def _stop(options: ProfileOptions, setting: Setting) -> NoReturn:
    """Note what did not fit, and end all ranks: those in an exchange cannot be called back from it."""
    note = f"{setting.tokens} {setting.cp_degree} {setting.recompute} {setting.shape}\n"
    options.failure_note.write_text(note, encoding="utf-8")
    error = StopRequested(
        f"out of memory at {setting} while other ranks wait in an exchange; noted: run the same command again to go on"
    )
    fail(error, PROGRAM)


def _fit(table: ProfileTable, options: ProfileOptions) -> ProfileFit | None:
    """Fit, write the cost model and print the errors; a table with too few rows is a table all the same."""
    try:
        fit = fit_profile(table, name=options.cost_file.name.removesuffix(".json"))
    except DataError as error:
        print(f"{PROGRAM}: no cost model: {error}", file=sys.stderr, flush=True)
        return None
    cost_file.save(fit.cost, options.cost_file)
    print_fit(table, fit, Path(options.out), options.cost_file)
    return fit
