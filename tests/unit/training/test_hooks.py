"""The names and signatures of megatron-core 0.19.2 that our hooks hang on, *used by name* where we patch them.

These read the wheel's source. When one fails, a release has moved something: look at hooks.py or recompute.py again.
"""

import ast
import inspect
import itertools
import json
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import megatron.core
import numpy as np
import pytest
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.training import checkpointing, training

from megatron_hbp.errors import DivergedError, PlanError
from megatron_hbp.feed.feed import Feed
from megatron_hbp.model import context as micro_batch_context
from megatron_hbp.model import loss
from megatron_hbp.model.recompute import FLAGS, RecomputeSwitch
from megatron_hbp.parallel.pipeline_shapes import PlannedP2PCommunicator
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.runtime import setup
from megatron_hbp.runtime.setup import Runtime
from megatron_hbp.training import hooks
from megatron_hbp.training.metrics import RunMetrics
from tests.equivalence.support.plans import plan_of

CORE = Path(megatron.core.__path__[0])


@cache
def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def function(module: ModuleType, name: str) -> ast.FunctionDef:
    """The definition of a module's top-level function."""
    return next(n for n in tree_of(module).body if isinstance(n, ast.FunctionDef) and n.name == name)


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a bare name."""
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def parameters(callable_: object) -> list[str]:
    return list(inspect.signature(callable_).parameters)  # type: ignore[arg-type]


# ---------------------------------------------------------------- megatron.training, as hooks.py patches it


@pytest.mark.parametrize(
    "module, caller, name",
    [
        (training, "train", "get_forward_backward_func"),
        (training, "evaluate", "get_forward_backward_func"),
        (training, "train", "training_log"),
        (training, "train", "consume_seqlen_stats_in_iteration"),
        (training, "evaluate_and_print_results", "evaluate"),
        (checkpointing, "load_checkpoint", "check_checkpoint_args"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_caller_uses_the_module_global(module, caller, name):
    body = function(module, caller)
    assert len(calls(body, name)) == 1
    bound = {n.id for n in ast.walk(body) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {alias.asname or alias.name for n in ast.walk(body) if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert name not in bound  # neither reassigned nor imported inside the function
    assert hasattr(module, name)


def test_schedules_are_called_with_our_keywords():
    for caller in ("train_step", "evaluate"):
        for call in calls(function(training, caller), "forward_backward_func"):
            assert not call.args
            assert {"model", "num_microbatches", "data_iterator"} <= {keyword.arg for keyword in call.keywords}
    assert len(calls(function(training, "evaluate"), "forward_backward_func")) >= 1
    for call in calls(function(training, "evaluate"), "forward_backward_func"):
        assert next(ast.unparse(k.value) for k in call.keywords if k.arg == "forward_only") == "True"


def test_training_log_takes_what_we_read_where_we_read_it():
    order = ["loss_dict", "total_loss_dict", "learning_rate", "iteration"]
    order += ["loss_scale", "report_memory_flag", "skipped_iter", "grad_norm"]
    assert parameters(training.training_log)[: len(order)] == order
    (call,) = calls(function(training, "train"), "training_log")
    assert [ast.unparse(argument) for argument in call.args[: len(order)]] == order


def test_evaluate_returns_losses_first():
    values = [n.value for n in ast.walk(function(training, "evaluate")) if isinstance(n, ast.Return)]
    tuples = [value for value in values if isinstance(value, ast.Tuple) and len(value.elts) == 3]
    assert tuples == values
    assert {ast.unparse(value.elts[0]) for value in tuples} == {"total_loss_dict", "None"}


def test_the_step_at_hand_is_in_args_before_it_runs():
    """hooks.py asks get_args().curr_iteration which step of the plan to run."""
    body = function(training, "train")
    stores = [
        n for n in ast.walk(body) if isinstance(n, ast.Attribute) and n.attr == "curr_iteration"
        and isinstance(n.ctx, ast.Store)
    ]  # fmt: skip
    steps = calls(body, "train_step")
    assert len(stores) == 1 and steps
    assert all(stores[0].lineno < step.lineno for step in steps)


def test_checkpoints_are_checked_before_the_model_is_loaded():
    body = function(checkpointing, "load_checkpoint")
    (check,) = calls(body, "check_checkpoint_args")
    assert check.lineno < min(call.lineno for call in calls(body, "load_model_state_dict"))


# ---------------------------------------------------------------- megatron.core, as pipeline_shapes.py uses it


def test_the_schedule_takes_a_communicator_and_its_groups():
    schedule = schedules.forward_backward_pipelining_without_interleaving
    assert {"p2p_communicator", "pg_collection"} <= set(parameters(schedule))
    assert parameters(P2PCommunicator.__init__) == ["self", "pp_group", "config"]


def test_shapes_are_asked_in_one_place():
    order = ["tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next"]
    assert parameters(P2PCommunicator._communicate_shapes) == ["self", *order]
    assert parameters(PlannedP2PCommunicator._communicate_shapes) == ["self", *order]
    asked = [
        n for n in ast.walk(tree_of(p2p_communication)) if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute) and n.func.attr == "_communicate_shapes"
    ]  # fmt: skip
    assert [[ast.unparse(argument) for argument in call.args] for call in asked] == [order]
    body = ast.unparse(ast.parse(inspect.getsource(P2PCommunicator).lstrip()))
    assert "recv_prev_shape, recv_next_shape = self._communicate_shapes(" in body
    assert "if config.variable_seq_lengths or" in body


# ---------------------------------------------------------------- what the hooks do with it


@pytest.fixture
def plan():
    lengths = np.array([3, 4, 5, 6])
    packs = [(0, 0, 0, 0, [0]), (1, 0, 0, 0, [1]), (1, 1, 0, 0, [2]), (1, 2, 0, 0, [3])]
    return plan_of(packs, tiers=[Tier(packing_length=8)], lengths=lengths, num_ranks=1)


@pytest.fixture
def args(monkeypatch):
    values = SimpleNamespace(curr_iteration=0, load="DIR", finetune=False)
    monkeypatch.setattr(hooks, "get_args", lambda: values)
    return values


def test_install_replaces_what_megatron_calls(monkeypatch, plan):
    names = [(training, name) for name in ("get_forward_backward_func", "training_log", "evaluate")]
    names += [(training, "consume_seqlen_stats_in_iteration"), (RerunStateMachine, "should_checkpoint_and_exit")]
    names += [(checkpointing, "check_checkpoint_args"), (checkpointing, "_load_base_checkpoint")]
    before = {(module, name): getattr(module, name) for module, name in names}
    for (module, name), value in before.items():
        monkeypatch.setattr(module, name, value)  # put back after the test
    hooks.install(runtime_of(plan), RunMetrics(plan, None))
    for (module, name), value in before.items():
        assert getattr(module, name) is not value and getattr(module, name).__wrapped__ is value


def test_a_schedule_runs_the_micro_batches_of_its_step(plan, args):
    ran = []

    def schedule(*, model, num_microbatches, forward_only=False, **rest):
        ran.append((num_microbatches, forward_only, len(micro_batch_context._on_bind), rest))

    evaluations, metrics = itertools.cycle(range(plan.num_steps)), RunMetrics(plan, None)
    wrapped = partial(hooks._schedule, runtime_of(plan), evaluations, metrics, lambda **kwargs: schedule)
    forward_backward = wrapped(schedule_pg_collection=None)
    feed = feed_for(plan)
    for step in (0, 1):
        args.curr_iteration = step
        forward_backward(model=[StubModel()], num_microbatches=99, data_iterator=feed)
    assert ran == [(1, False, 1, {"data_iterator": feed}), (3, False, 1, {"data_iterator": feed})]
    ran.clear()
    evaluation = wrapped()
    for _ in range(3):  # evaluation counts its own steps, in a circle
        evaluation(model=StubModel(), num_microbatches=99, forward_only=True, data_iterator=feed)
    assert [(count, forward) for count, forward, *_ in ran] == [(1, True), (3, True), (1, True)]
    assert not micro_batch_context._on_bind  # the recompute switch is registered during the schedule only


def runtime_of(plan: Plan) -> Runtime:
    options: Any = SimpleNamespace(train=SimpleNamespace(plan=plan), data=[SimpleNamespace(plan=plan)])
    return Runtime(args=None, options=options, model=None, switch=RecomputeSwitch(), notes=())


def feed_for(plan: Plan) -> Feed:
    return Feed(plan=plan, store=None, groups=None, rank=0, unit=1, full_length=False, device=None)  # type: ignore[arg-type]


class StubModel:
    """A model without modules."""

    config = SimpleNamespace(pipeline_model_parallel_size=1, variable_seq_lengths=False, hidden_size=8)

    def modules(self):
        return iter(())


@pytest.mark.parametrize("wrap", [lambda feed: feed, lambda feed: SimpleNamespace(iterable=feed)])
def test_the_feed_is_found_behind_megatrons_iterators(plan, wrap):
    feed = feed_for(plan)
    assert hooks.feed_of(wrap(feed)) is hooks.feed_of([wrap(feed), wrap(feed_for(plan))]) is feed


def test_stages_of_varying_shapes_are_told_them(monkeypatch, plan):
    made = []

    def communicator(*args):
        made.append(args)
        return "communicator"

    groups = SimpleNamespace(pp="the pipeline")
    monkeypatch.setattr(setup.ProcessGroupCollection, "use_mpu_process_groups", lambda: groups)
    monkeypatch.setattr(setup, "PlannedP2PCommunicator", communicator)
    monkeypatch.setattr(StubModel, "config", SimpleNamespace(pipeline_model_parallel_size=2, variable_seq_lengths=True))
    arguments = setup.pipeline_arguments([StubModel()], feed_for(plan), 1)

    assert arguments == {"p2p_communicator": "communicator", "pg_collection": groups}
    assert made == [("the pipeline", StubModel.config, [4, 5, 6])]


def test_a_checkpoint_of_this_plan_or_of_none_goes_on_to_megatrons_checks(plan, args):
    seen = []

    def check_checkpoint_args(checkpoint_args, skip_args=None):
        seen.append((checkpoint_args, skip_args))

    check = partial(hooks._check, plan, check_checkpoint_args)
    mine, none = SimpleNamespace(hbp_plan_hash=plan.hash), SimpleNamespace()
    check(mine)
    check(none, skip_args={"num_layers"})  # as load_checkpoint calls it in 0.19.2
    assert seen == [(mine, None), (none, {"num_layers"})]


def test_our_check_takes_the_call_that_load_checkpoint_makes():
    (call,) = calls(function(checkpointing, "load_checkpoint"), "check_checkpoint_args")
    given = inspect.Signature.bind(
        inspect.signature(hooks._check), "plan", "check_checkpoint_args",
        *call.args, **{str(keyword.arg): keyword.value for keyword in call.keywords},
    )  # fmt: skip
    assert given.arguments


def test_a_checkpoint_of_another_plan_names_both(plan, args):
    with pytest.raises(PlanError) as refused:
        hooks._check(plan, lambda *a, **k: pytest.fail("refused too late"), SimpleNamespace(hbp_plan_hash="f" * 64))
    for part in ("f" * 12, plan.hash[:12], "DIR", "--finetune"):
        assert part in str(refused.value)
    assert refused.value.is_everywhere


def test_a_checkpoint_of_another_plan_is_refused_before_its_tensors_are_read(plan, args):
    states: list[Any] = [None, {}, {"args": SimpleNamespace()}, {"args": SimpleNamespace(hbp_plan_hash="f" * 64)}]
    load = partial(hooks._load, plan, lambda state, args, rank0: (state, "name", False, None))
    for state in states[:3]:
        assert load(state, None, rank0=True)[0] is state
    with pytest.raises(PlanError, match="--finetune"):
        load(states[3], None, rank0=True)
    args.finetune = True
    assert load(states[3], None, rank0=True)[0] is states[3]


def test_what_all_ranks_share_is_read_before_the_tensors():
    body = function(checkpointing, "load_checkpoint")
    first, second = sorted(calls(body, "_load_base_checkpoint"), key=lambda call: call.lineno)
    keywords = [{word.arg: ast.unparse(word.value) for word in call.keywords}.get("rank0") for call in (first, second)]
    assert keywords == ["True", "False"]


def test_samples_and_tokens_are_those_of_the_plan(plan, args):
    """Megatron-LM counts packs, the same number in every step, and takes --seq-length times that for tokens."""
    seen: list[int] = []
    tokens = partial(hooks._tokens_of_step, plan, training.consume_seqlen_stats_in_iteration)
    log = partial(hooks._log, plan, RunMetrics(plan, None), lambda *_: seen.append(args.consumed_train_samples))
    assert tokens() == (3.0, 9.0)  # of the step that has run
    for iteration in (1, 2):
        args.consumed_train_samples = 999
        log({}, {}, None, iteration)
    args.curr_iteration = 1
    assert seen == [1, 4] and tokens() == (4.0 + 5 + 6, 16.0 + 25 + 36)


def test_counts_are_changed_where_megatron_logs_and_before_it_saves():
    """training_log is called after the loop has added its own count, and before a checkpoint takes the arguments."""
    body = function(training, "train")
    (log,), (tokens,) = calls(body, "training_log"), calls(body, "consume_seqlen_stats_in_iteration")
    counts = [
        n.lineno for n in ast.walk(body) if isinstance(n, ast.AugAssign)
        and ast.unparse(n.target) == "args.consumed_train_samples"
    ]  # fmt: skip
    assert max(counts) < tokens.lineno < log.lineno
    saves = [call.lineno for call in calls(body, "checkpoint_and_decide_exit")]
    assert saves and min(saves) > log.lineno
    step = inspect.getsource(training.training_log)
    assert "consumed samples: {:12d} |'.format(args.consumed_train_samples)" in step


def test_a_step_that_is_not_finite_twice_ends_all_ranks_with_70(args):
    args.curr_iteration = 6
    check = partial(hooks._diverge, lambda machine: machine)
    assert check((False, False, 0)) == (False, False, 0)
    for answer in ((True, True, 16), (False, True, 17)):
        with pytest.raises(DivergedError, match="in iteration 7") as refused:
            check(answer)
        assert refused.value.is_everywhere and refused.value.exit_code == 70
    (asks,) = [
        n for n in ast.walk(function(training, "train_step")) if isinstance(n, ast.Call)
        and ast.unparse(n.func) == "rerun_state_machine.should_checkpoint_and_exit"
    ]  # fmt: skip
    assert not asks.args  # before the optimizer's step
    assert asks.lineno < min(n.lineno for n in ast.walk(function(training, "train_step"))
                             if isinstance(n, ast.Call) and ast.unparse(n.func) == "optimizer.step")  # fmt: skip


def test_log_lines_carry_what_megatron_logs(monkeypatch, tmp_path, plan, args):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    metrics, calls = RunMetrics(plan, tmp_path / "m.jsonl"), []

    def megatrons_log(*args, **kwargs):
        calls.append((args, kwargs))
        return "flag"

    log = partial(hooks._log, plan, metrics, megatrons_log)
    assert log({"lm loss": 1.25}, {}, 0.5, 2, 1.0, True, 0, 0.75, None, is_first_iteration=False) == "flag"
    evaluate = partial(hooks._evaluate, metrics, lambda *args, **kwargs: ({"lm loss": 2.5}, None, False))
    assert evaluate("anything")[0] == {"lm loss": 2.5}
    assert hooks._evaluate(metrics, lambda: (None, None, True)) == (None, None, True)  # out of time

    step, validation = (json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines())
    assert (step["iteration"], step["steps"], step["loss"]) == (2, 2, 1.25)
    assert (step["learning_rate"], step["grad_norm"]) == (0.5, 0.75)
    assert step["tokens"] == 4 + 5 + 6 and step["cp_degrees"] == [1]
    assert validation == {"kind": "validation", "loss": 2.5}
    assert calls == [(({"lm loss": 1.25}, {}, 0.5, 2, 1.0, True, 0, 0.75, None), {"is_first_iteration": False})]


# ---------------------------------------------------------------- megatron.core, as forward.py and recompute.py use it


def test_gpt_model_takes_and_calls_an_output_processor():
    assert {"labels", "output_processor", "output_processor_context"} <= set(parameters(GPTModel.forward))
    assert parameters(GPTModel.forward)[1:4] == ["input_ids", "position_ids", "attention_mask"]
    source = ast.parse(inspect.getsource(sys.modules[GPTModel.__module__]))
    (call,) = calls(source, "output_processor")
    given = {keyword.arg for keyword in call.keywords}
    ours = inspect.signature(loss.supervised_token_losses).parameters
    expected = {name for name, parameter in ours.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert not call.args and expected <= given


def test_recompute_reaches_checkpoint_through_the_packages_attribute():
    """A module that imported the names would keep the ones that don't capture the context."""
    sites = {"checkpoint": 0, "CheckpointWithoutOutput": 0}
    for path in CORE.rglob("*.py"):
        if path.is_relative_to(CORE / "tensor_parallel"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core.tensor_parallel"):
                assert not sites.keys() & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in sites:
                owner = ast.unparse(node.func.value)
                assert not owner.endswith("tensor_parallel.random"), path
                sites[node.func.attr] += owner == "tensor_parallel"
    assert sites["checkpoint"] >= 6 and sites["CheckpointWithoutOutput"] >= 4
    assert parameters(tensor_parallel.checkpoint)[:2] == ["function", "distribute_saved_activations"]
    assert parameters(tensor_parallel.CheckpointWithoutOutput.checkpoint)[:2] == ["self", "run_function"]


def test_te_checkpoint_is_imported_by_name_into_megatron_core():
    holders = [p for p in CORE.rglob("*.py") if "import te_checkpoint" in p.read_text(encoding="utf-8")]
    assert CORE / "recompute.py" in holders


@pytest.mark.parametrize("name, flag", [(name, flag) for name, flags in FLAGS.items() for flag in flags])
def test_recompute_flag_is_read_at_forward(name, flag):
    """As `self.flag` in a condition of a function that is not the constructor."""
    readers = []
    for path in (CORE / "transformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                tests = [ast.unparse(n.test) for n in ast.walk(node) if isinstance(n, ast.If)]
                readers += [f"{path.name}:{node.name}" for test in tests if f"self.{flag}" in test]
    assert readers, f"{name}: nobody asks for {flag} any more"


def test_recompute_modules_are_megatrons():
    """The names that a tier may write are those of --recompute-modules, as far as our models have them."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    source = inspect.getsource(TransformerConfig.__post_init__)
    for name in FLAGS:
        assert f'"{name}"' in source, name
    fields = TransformerConfig.__dataclass_fields__
    assert {"recompute_granularity", "recompute_method", "recompute_num_layers"} <= fields.keys()


def test_full_recompute_is_read_from_the_config_at_forward():
    block = (CORE / "transformer" / "transformer_block.py").read_text(encoding="utf-8")
    reads = [
        node.name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.FunctionDef)
        and "self.config.recompute_granularity == 'full'" in ast.unparse(node)
    ]  # fmt: skip
    assert "forward" in reads
    recompute = (CORE / "recompute.py").read_text(encoding="utf-8")
    assert "recompute_method" in recompute and "recompute_num_layers" in recompute
