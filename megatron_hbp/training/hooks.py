"""The hooks into megatron.training, all of them, as of megatron-core 0.19.2.

| name in megatron.training | what ours adds |
|---|---|
| training.get_forward_backward_func | the micro-batches of *this* step and their shapes, times, the recompute switch |
| training.training_log | our JSON line beside Megatron-LM's, and `consumed samples` as the plan has them |
| training.consume_seqlen_stats_in_iteration | the tokens of the step, for Megatron-LM's count of operations |
| training.evaluate | the held-out loss for the same file |
| RerunStateMachine.should_checkpoint_and_exit (megatron.core) | a step that is not finite twice ends the run with 70 |
| checkpointing._load_base_checkpoint | a checkpoint trained with another plan is refused before its tensors are read |
| checkpointing.check_checkpoint_args | the same for formats whose arguments come with the tensors |

`tests/unit/training/test_hooks.py` fails when a release moves one of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.core.utils import get_model_config
from megatron.training import checkpointing, get_args, training

from megatron_hbp.errors import DivergedError, PlanError, everywhere
from megatron_hbp.model import context as micro_batch_context
from megatron_hbp.model.recompute import RecomputeSwitch
from megatron_hbp.parallel.pipeline_shapes import PlannedP2PCommunicator
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.training.feed import Feed
from megatron_hbp.training.metrics import RunMetrics
from megatron_hbp.training.options import HbpOptions


def install(options: HbpOptions, switch: RecomputeSwitch, metrics: RunMetrics) -> None:
    """Hook a plan into Megatron-LM's loop; once a process.

    Args:
        options: the plans.
        switch: sets the recompute policy of each micro-batch on the model.
        metrics: what is written down.
    """
    assert options.train is not None
    training.get_forward_backward_func = _planned_schedule(
        training.get_forward_backward_func, options.valid.plan if options.valid else None, switch, metrics
    )
    training.training_log = _logging(training.training_log, options.train.plan, metrics)
    training.consume_seqlen_stats_in_iteration = _tokens_of_step(
        training.consume_seqlen_stats_in_iteration, options.train.plan
    )
    training.evaluate = _reporting(training.evaluate, metrics)
    RerunStateMachine.should_checkpoint_and_exit = _diverging(RerunStateMachine.should_checkpoint_and_exit)
    checkpointing.check_checkpoint_args = _same_plan(checkpointing.check_checkpoint_args)
    checkpointing._load_base_checkpoint = _same_plan_early(checkpointing._load_base_checkpoint)


def _planned_schedule(
    get_schedule: Callable, valid_plan: Plan | None, switch: RecomputeSwitch, metrics: RunMetrics
) -> Callable:
    """Wrap the factory of forward-backward functions.

    Megatron-LM's own calculator of micro-batch counts knows ramps only: its loop refuses a count that falls. So the
    nominal count stays constant there, and the plan's count for the step at hand goes to the schedule.
    """

    evaluations = 0  # goes on from one evaluation to the next, as the feed of the held-out plan does

    @functools.wraps(get_schedule)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
        schedule = get_schedule(*args, **kwargs)

        @functools.wraps(schedule)
        def forward_backward(*, model: Any, num_microbatches: int, forward_only: bool = False, **rest: Any) -> Any:
            nonlocal evaluations
            if forward_only:
                assert valid_plan is not None
                step = evaluations % valid_plan.num_steps
                evaluations += 1
            else:
                step = get_args().curr_iteration
            chunks = model if isinstance(model, list) else [model]
            feed = feed_of(rest["data_iterator"])
            num_microbatches = len(feed.slots(step))
            rest |= pipeline_arguments(chunks, feed, step)
            metrics.start(training=not forward_only)
            with micro_batch_context.on_bind(switch):
                losses = schedule(model=model, num_microbatches=num_microbatches, forward_only=forward_only, **rest)
            metrics.finish()
            return losses

        return forward_backward

    return get_forward_backward_func


def feed_of(data_iterator: Any) -> Feed:
    """The feed behind Megatron-LM's iterators: as it is, in a RerunDataIterator, or one for each virtual stage."""
    first = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    feed = getattr(first, "iterable", first)
    assert isinstance(feed, Feed), f"Megatron-LM's data iterator is not our feed but {type(feed).__name__}"
    return feed


def pipeline_arguments(chunks: list[Any], feed: Feed, step: int) -> dict[str, Any]:
    """Arguments that let the schedule take shapes from the plan; none where stages exchange fixed ones, or nothing.

    Args:
        chunks: the model.
        feed: that of the plan whose step is run.
        step: the step of that plan.
    """
    config = get_model_config(chunks[0])
    if config.pipeline_model_parallel_size == 1 or not config.variable_seq_lengths:
        return {}
    lengths = [feed.local_tokens(step, slot) for slot in feed.slots(step)]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return {"p2p_communicator": PlannedP2PCommunicator(groups.pp, config, lengths), "pg_collection": groups}


def _logging(training_log: Callable, plan: Plan, metrics: RunMetrics) -> Callable:
    """Count samples as the plan has them: Megatron-LM has just added the same number of packs as in every step.

    Its log and its checkpoints have this count, and nothing else depends on it: learning rates go by a count of their
    own, and a run goes on from the iteration.
    """

    @functools.wraps(training_log)
    def log(loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        get_args().consumed_train_samples = int(plan.pack_offsets[np.searchsorted(plan.pack_step, iteration)])
        grad_norm = args[3] if len(args) > 3 else kwargs.get("grad_norm")
        metrics.log_step(iteration=iteration, losses=loss_dict, learning_rate=learning_rate, grad_norm=grad_norm)
        return training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    return log


def _tokens_of_step(consume: Callable, plan: Plan) -> Callable:
    """The tokens of all packs of the step that has just run, and the sum of their samples' squared lengths."""

    @functools.wraps(consume)
    def tokens_of_step() -> tuple[float, float]:
        packs = plan.pack_step == get_args().curr_iteration
        return float(plan.pack_tokens[packs].sum()), float(plan.pack_squares[packs].sum())

    return tokens_of_step


def _diverging(should_checkpoint_and_exit: Callable) -> Callable:
    """Raise DivergedError on all ranks where Megatron-LM would save a checkpoint and leave with 16 or 17.

    That is after gradients with NaN or Inf (or a loss spike, where it looks for them) in two runs of one step.
    """

    @functools.wraps(should_checkpoint_and_exit)
    def check(machine: RerunStateMachine) -> tuple[bool, bool, int]:
        answer: tuple[bool, bool, int] = should_checkpoint_and_exit(machine)
        if answer[1]:
            raise everywhere(
                DivergedError(
                    f"training diverged in iteration {get_args().curr_iteration + 1}: gradients are not finite, which "
                    f"a second try has confirmed (the log says where); the step was not taken, nothing was saved"
                )
            )
        return answer

    return check


def _reporting(evaluate: Callable, metrics: RunMetrics) -> Callable:
    @functools.wraps(evaluate)
    def report(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        if result[0]:
            metrics.log_validation(result[0])
        return result

    return report


def _same_plan(check_checkpoint_args: Callable) -> Callable:
    @functools.wraps(check_checkpoint_args)
    def check(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_another_plan(checkpoint_args)
        return check_checkpoint_args(checkpoint_args, *args, **kwargs)

    return check


def _same_plan_early(load_base_checkpoint: Callable) -> Callable:
    """Distributed checkpoints are opened twice: with rank0=True for what all ranks share, then for their tensors."""

    @functools.wraps(load_base_checkpoint)
    def load(*args: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(*args, **kwargs)
        state = loaded[0]
        if state is not None and "args" in state and not get_args().finetune:
            _refuse_another_plan(state["args"])
        return loaded

    return load


def _refuse_another_plan(checkpoint_args: Any) -> None:
    mine, theirs = get_args().hbp_plan_hash, getattr(checkpoint_args, "hbp_plan_hash", None)
    if theirs is not None and theirs != mine:
        raise everywhere(
            PlanError(
                f"the checkpoint in {get_args().load} was trained with plan {theirs[:12]}, --hbp-plan is {mine[:12]}: "
                f"resume with the plan it was trained with, or start anew with --finetune"
            )
        )
