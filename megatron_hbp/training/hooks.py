"""The hooks into Megatron-LM's training loop, all of them, as of megatron-core 0.19.2.

| name | what ours adds |
|---|---|
| training.get_forward_backward_func | the micro-batches of *this* step and their shapes, times, the recompute switch |
| training.training_log | our JSON line beside Megatron-LM's, and `consumed samples` as the plan has them |
| training.consume_seqlen_stats_in_iteration | the tokens of the step, for Megatron-LM's count of operations |
| training.evaluate | the held-out loss for the same file |
| RerunStateMachine.should_checkpoint_and_exit (megatron.core) | a step that is not finite twice ends the run with 70 |
| checkpointing._load_base_checkpoint | a checkpoint trained with another plan is refused before its tensors are read |
| checkpointing.check_checkpoint_args | the same for formats whose arguments come with the tensors |

A hook is called with what it is about, then with the function that it goes around, then with that one's arguments.
`tests/unit/training/test_hooks.py` fails when a release moves one of them.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.training import checkpointing, get_args, training

from megatron_hbp.errors import DivergedError, PlanError, everywhere
from megatron_hbp.feed.feed import Feed
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.runtime.setup import Runtime
from megatron_hbp.training.metrics import RunMetrics


def install(runtime: Runtime, metrics: RunMetrics) -> None:
    """Hook the plans of a run into Megatron-LM's loop; once a process."""
    assert runtime.options.train is not None
    plan = runtime.options.train.plan
    # goes on from one evaluation to the next, as the feed of the held-out plan does
    evaluations = itertools.cycle(range(runtime.options.data[-1].plan.num_steps))
    for holder, name, hook in (
        (training, "get_forward_backward_func", partial(_schedule, runtime, evaluations, metrics)),
        (training, "training_log", partial(_log, plan, metrics)),
        (training, "consume_seqlen_stats_in_iteration", partial(_tokens_of_step, plan)),
        (training, "evaluate", partial(_evaluate, metrics)),
        (RerunStateMachine, "should_checkpoint_and_exit", _diverge),
        (checkpointing, "_load_base_checkpoint", partial(_load, plan)),
        (checkpointing, "check_checkpoint_args", partial(_check, plan)),
    ):
        setattr(holder, name, _around(getattr(holder, name), hook))


def _around(plain: Callable, hook: Callable) -> Callable:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(plain, *args, **kwargs)

    return call


def _schedule(
    runtime: Runtime, evaluations: Iterator[int], metrics: RunMetrics, get_schedule: Callable, *args: Any, **kwargs: Any
) -> Callable:
    """A forward-backward function that runs the micro-batches of a plan's step.

    Megatron-LM's own calculator of micro-batch counts knows ramps only: its loop refuses a count that falls. So the
    nominal count stays constant there, and the plan's count for the step at hand goes to the schedule.
    """
    schedule = get_schedule(*args, **kwargs)

    def forward_backward(*, model: Any, data_iterator: Any, forward_only: bool = False, **rest: Any) -> Any:
        step = next(evaluations) if forward_only else get_args().curr_iteration
        metrics.start(training=not forward_only)
        chunks, feed = model if isinstance(model, list) else [model], feed_of(data_iterator)
        rest |= {"data_iterator": data_iterator, "forward_only": forward_only}
        losses = runtime.run_step(schedule, chunks, feed, step, **rest)
        metrics.finish()
        return losses

    return forward_backward


def feed_of(data_iterator: Any) -> Feed:
    """The feed behind Megatron-LM's iterators: as it is, in a RerunDataIterator, or one for each virtual stage."""
    first = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    feed = getattr(first, "iterable", first)
    assert isinstance(feed, Feed), f"Megatron-LM's data iterator is not our feed but {type(feed).__name__}"
    return feed


def _log(
    plan: Plan, metrics: RunMetrics, training_log: Callable, loss_dict: Any, total_loss_dict: Any, learning_rate: Any,
    iteration: int, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Write our line, and count samples as the plan has them: Megatron-LM has just added as many packs as ever.

    Its log and its checkpoints have this count, and nothing else depends on it: learning rates go by a count of their
    own, and a run goes on from the iteration.
    """
    get_args().consumed_train_samples = int(plan.pack_offsets[np.searchsorted(plan.pack_step, iteration)])
    grad_norm = args[3] if len(args) > 3 else kwargs.get("grad_norm")
    metrics.log_step(iteration=iteration, losses=loss_dict, learning_rate=learning_rate, grad_norm=grad_norm)
    return training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)


def _tokens_of_step(plan: Plan, consume: Callable) -> tuple[float, float]:
    """The tokens of all packs of the step that has just run, and the sum of their samples' squared lengths."""
    packs = plan.pack_step == get_args().curr_iteration
    return float(plan.pack_tokens[packs].sum()), float(plan.pack_squares[packs].sum())


def _evaluate(metrics: RunMetrics, evaluate: Callable, *args: Any, **kwargs: Any) -> Any:
    result = evaluate(*args, **kwargs)
    if result[0]:
        metrics.log_validation(result[0])
    return result


def _diverge(should_checkpoint_and_exit: Callable, machine: RerunStateMachine) -> tuple[bool, bool, int]:
    """Raise DivergedError on all ranks where Megatron-LM would save a checkpoint and leave with 16 or 17.

    That is after gradients with NaN or Inf (or a loss spike, where it looks for them) in two runs of one step.
    """
    answer: tuple[bool, bool, int] = should_checkpoint_and_exit(machine)
    if answer[1]:
        raise everywhere(
            DivergedError(
                f"training diverged in iteration {get_args().curr_iteration + 1}: gradients are not finite, which a "
                f"second try has confirmed (the log says where); the step was not taken, nothing was saved"
            )
        )
    return answer


def _load(plan: Plan, load_base_checkpoint: Callable, *args: Any, **kwargs: Any) -> Any:
    """Distributed checkpoints are opened twice: with rank0=True for what all ranks share, then for their tensors."""
    loaded = load_base_checkpoint(*args, **kwargs)
    state = loaded[0]
    if state is not None and "args" in state and not get_args().finetune:
        _refuse_another(plan, state["args"])
    return loaded


def _check(plan: Plan, check_checkpoint_args: Callable, checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_another(plan, checkpoint_args)
    return check_checkpoint_args(checkpoint_args, *args, **kwargs)


def _refuse_another(plan: Plan, checkpoint_args: Any) -> None:
    theirs = getattr(checkpoint_args, "hbp_plan_hash", None)
    if theirs is not None and theirs != plan.hash:
        raise everywhere(
            PlanError(
                f"the checkpoint in {get_args().load} was trained with plan {theirs[:12]}, --hbp-plan is "
                f"{plan.hash[:12]}: resume with the plan it was trained with, or start anew with --finetune"
            )
        )
