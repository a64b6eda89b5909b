"""Our flags, the flags a plan implies, and one clear refusal for each combination that cannot work."""

import argparse
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_hbp.data.manifest import TokenizerInfo
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.writer import StoreWriter
from megatron_hbp.errors import ConfigError, DataError, PlanError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.runtime import checks, options, program
from megatron_hbp.runtime.options import HbpOptions, PlannedData
from megatron_hbp.training import main
from tests.equivalence.support.plans import plan_of

LENGTHS = (5, 9, 30, 14)
TIERS = (Tier(packing_length=16), Tier(packing_length=64, cp_degree=2))
# two steps of one and two slots on two ranks
PACKS = [(0, 0, 0, 0, [0]), (0, 0, 1, 0, [1]), (1, 0, 0, 1, [2]), (1, 1, 0, 0, [3])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    folder: Path

    def store(self, name: str = "store", lengths: tuple[int, ...] = LENGTHS) -> Path:
        """The token store of that name, made at the first call."""
        path = self.folder / name
        if not path.exists():
            info = TokenizerInfo(
                name="n", sha256="0", chat_template_sha256="0", vocab_size=320, eos_id=None, pad_id=None
            )
            with StoreWriter(path) as writer:
                for n in lengths:
                    writer.add(np.arange(n, dtype=np.int32), np.ones(n, np.uint8))
                writer.finish(tokenizer=info, sources=[])
        return path

    def plan(self, name: str = "plan", **changes: object) -> Path:
        """A plan file of PACKS with fields changed."""
        path = self.folder / name
        planfile.save(plan(**changes), path)
        return path


def plan(**changes: object) -> Plan:
    changes = {"num_ranks": 2, "tiers": TIERS, **changes}
    num_ranks, tiers = changes.pop("num_ranks"), changes.pop("tiers")
    made = plan_of(PACKS, tiers=tiers, lengths=np.array(LENGTHS), num_ranks=num_ranks)  # type: ignore[arg-type]
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(folder=tmp_path)


def read(*argv: object) -> HbpOptions:
    return HbpOptions.from_argv([str(word) for word in argv])


# ---------------------------------------------------------------- from_argv


def test_without_a_plan_there_is_nothing():
    nothing = read("--num-layers", 2, "--hbp", "--save", "run")
    assert nothing.data == nothing.tiers == [] and nothing.exchange is None and nothing.read_ahead == 2


def test_plans_stores_and_metrics_among_other_flags(files):
    options = read(
        "--num-layers", 2, "--hbp-plan", files.plan(), "--hbp-store", files.store(), "--lr", "1e-3",
        "--hbp-valid-plan", files.plan("valid", seed=4), "--hbp-valid-store", files.store(), "--hbp-metrics", "m.jsonl",
    )  # fmt: skip
    assert options.train is not None and options.valid is not None
    assert options.train.plan.hash == plan().hash and options.valid.plan.hash == plan(seed=4).hash
    assert options.train.store.num_samples == 4 and options.metrics == Path("m.jsonl") and options.run_dir is None
    assert options.data == [options.train, options.valid] and len(options.tiers) == 4


def test_the_other_options_and_a_run_directory(files):
    plan = ("--hbp-plan", files.plan(), "--hbp-store", files.store())
    options = read(
        *plan, "--hbp-exchange", "p2p", "--hbp-kernel", "varlen", "--hbp-node-bandwidth", 200, "--hbp-read-ahead", 0,
        "--hbp-cluster-bandwidth", 20, "--save", "run/7",
    )  # fmt: skip
    assert (options.exchange, options.kernel, options.read_ahead) == ("p2p", "varlen", 0)
    assert (options.machine.node_bandwidth, options.machine.cluster_bandwidth) == (200e9, 20e9)
    assert options.run_dir == Path("run/7") and options.metrics == Path("run/7/metrics.jsonl")
    assert options.flags["hbp_exchange"] == "p2p" and options.flags.keys() == read(*plan).flags.keys()
    assert read(*plan, "--save", "run", "--hbp-metrics", "m").metrics == Path("m")
    assert read(*plan).metrics is None


@pytest.mark.parametrize("flag", ["--hbp-store", "--hbp-metrics", "--hbp-valid-plan", "--hbp-valid-store"])
def test_stray_flags_are_refused(flag):
    with pytest.raises(ConfigError, match=f"^{flag} needs --hbp-plan$"):
        read(flag, "x")


def test_a_plan_without_its_store_is_refused(files):
    with pytest.raises(ConfigError, match=r"^--hbp-plan .*plan needs its token store: give --hbp-store DIR$"):
        read("--hbp-plan", files.plan())
    with pytest.raises(ConfigError, match="give --hbp-valid-store DIR"):
        read("--hbp-plan", files.plan(), "--hbp-store", files.store(), "--hbp-valid-plan", files.plan())


def test_a_missing_store_is_a_data_error(files):
    with pytest.raises(DataError, match="no such token store"):
        read("--hbp-plan", files.plan(), "--hbp-store", files.folder / "nowhere")


def test_a_missing_plan_is_named(files):
    with pytest.raises(PlanError, match="absent cannot be read"):
        read("--hbp-plan", files.folder / "absent", "--hbp-store", files.store())


def test_a_plan_of_other_data_names_both(files):
    other = files.store("other", (5, 9, 30, 15))
    with pytest.raises(PlanError, match="belongs to other data") as refused:
        read("--hbp-plan", files.plan(), "--hbp-store", other)
    theirs = dataclasses.asdict(plan().data)["lengths_sha256"]
    assert theirs in str(refused.value) and str(refused.value).count("samples") == 2


def test_a_plan_of_another_store_of_the_same_lengths_names_both(files):
    data = dataclasses.replace(plan().data, store_fingerprint="e" * 64)
    with pytest.raises(PlanError, match="another token store") as refused:
        read("--hbp-plan", files.plan(data=data), "--hbp-store", files.store())
    assert "e" * 64 in str(refused.value) and TokenStore.open(files.store()).fingerprint in str(refused.value)


def test_valid_plan_for_other_ranks_is_refused(files):
    four = files.plan("four", num_ranks=4)
    with pytest.raises(PlanError, match="for 2 data-parallel ranks, --hbp-valid-plan for 4") as refused:
        read(
            "--hbp-plan", files.plan(), "--hbp-store", files.store(),
            "--hbp-valid-plan", four, "--hbp-valid-store", files.store(),
        )  # fmt: skip
    assert "hbp plan --ranks" in str(refused.value)


# ---------------------------------------------------------------- implied_flags


def loaded(files: Files, valid: bool = False, **changes: object) -> HbpOptions:
    def data(name: str, **changes: object) -> PlannedData:
        return PlannedData.load(str(files.plan(name, **changes)), str(files.store()), "--hbp-plan")

    train = data("plan", **changes)
    return dataclasses.replace(read(), train=train, valid=data("valid") if valid else None)


def parsed(flags: list[str]) -> dict[str, str]:
    pairs = [word for word in flags if word != "--calculate-per-token-loss"]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def test_implied_flags_follow_the_plan(files):
    flags = options.planned_flags(loaded(files))
    assert "--calculate-per-token-loss" in flags
    assert parsed(flags) == {
        "--micro-batch-size": "1",
        "--global-batch-size": "4",  # 2 ranks x 2 slots
        "--train-iters": "2",
        "--seq-length": "32",  # 64 over CP 2
        "--max-position-embeddings": "64",
        "--dataloader-type": "external",
        "--position-embedding-type": "rope",
        "--attention-dropout": "0",
        "--hidden-dropout": "0",
        "--eval-iters": "0",
        "--eval-interval": "3",  # never inside the run, so once after it
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": "320",
    }


def test_a_valid_plan_is_evaluated_whole(files):
    assert parsed(options.planned_flags(loaded(files, valid=True)))["--eval-iters"] == "2"


def test_megatron_takes_every_implied_flag_and_the_users_win(files, monkeypatch):
    from megatron.training.arguments import parse_args

    flags = options.planned_flags(loaded(files))
    monkeypatch.setattr("sys.argv", ["pretrain_hbp.py", *flags, "--train-iters", "1", "--hidden-dropout", "0.25"])
    args = parse_args(extra_args_provider=options.add_hbp_arguments)
    assert (args.train_iters, args.hidden_dropout, args.micro_batch_size) == (1, 0.25, 1)
    assert args.calculate_per_token_loss and args.dataloader_type == "external" and args.seq_length == 32


def test_the_users_flags_go_last(files, monkeypatch):
    class ArgumentsAreReadHere(Exception):
        pass

    def parse(**kwargs: object) -> None:
        raise ArgumentsAreReadHere

    user = ["--hbp-plan", str(files.plan()), "--hbp-store", str(files.store()), "--train-iters", "1"]
    monkeypatch.setattr("megatron.training.arguments.parse_and_validate_args", parse)
    monkeypatch.setattr(program, "platform_flags", lambda: ["--distributed-backend", "gloo"])
    monkeypatch.setattr("sys.argv", ["pretrain_hbp.py", *user])
    with pytest.raises(ArgumentsAreReadHere):
        main.run(user)
    assert sys.argv[1:] == ["--distributed-backend", "gloo", *options.planned_flags(loaded(files)), *user]


def test_our_flags_are_plain_values_for_megatrons_checkpoints():
    parser = options.add_hbp_arguments(argparse.ArgumentParser())
    values = vars(parser.parse_args(["--hbp-plan", "p", "--hbp-store", "s", "--hbp-metrics", "m"]))
    assert all(value is None or type(value) in (str, float, int) for value in values.values())


# ---------------------------------------------------------------- check_together


def megatron(**changes: object) -> SimpleNamespace:
    """Megatron-LM's arguments as a run of this plan has them."""
    values: dict[str, object] = {
        **dict.fromkeys(("overlap_grad_reduce", "overlap_param_gather", "sequence_parallel"), False),
        **dict.fromkeys(("num_experts", "recompute_granularity", "virtual_pipeline_model_parallel_size", "fp8", "fp4")),
        **dict.fromkeys(
            ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
             "expert_tensor_parallel_size"), 1),
        "data_parallel_size": 2, "world_size": 2, "train_iters": 2, "seq_length": 32, "fp8_recipe": "delayed",
        "moe_token_dispatcher_type": "alltoall", "moe_aux_loss_coeff": 0.0, "vocab_size": 320, "eval_iters": 0,
        "multi_latent_attention": False,
    }  # fmt: skip
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 8, "moe_aux_loss_coeff": 0.01},
        {"train_iters": 1},
        {"pipeline_model_parallel_size": 2},
    ],
)
def test_what_goes_together(files, changes):
    checks.check_plans(megatron(**changes), loaded(files))


def test_a_plan_for_other_ranks(files):
    args = megatron(data_parallel_size=4, world_size=16, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(PlanError) as refused:
        checks.check_plans(args, loaded(files))
    for part in ("for 2 data-parallel ranks", "this run has 4", "world 16 / TP 2 / PP 2", "hbp plan --ranks 4"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 319}, "--vocab-size 319 is less than the 320 words"),
        ({"eval_iters": 5}, "--eval-iters 5 needs held-out samples: give --hbp-valid-plan"),
        (
            {"world_size": 4, "pipeline_model_parallel_size": 2, "fp8": "hybrid", "fp8_recipe": "mxfp8",
             "tensor_model_parallel_size": 2, "sequence_parallel": True},
            "exchange 32 local tokens, which is no multiple of 64",
        ),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(files, changes, message):
    equal = (Tier(packing_length=32), Tier(packing_length=64, cp_degree=2))
    with pytest.raises(ConfigError, match=message):
        checks.check_plans(megatron(**changes), loaded(files, tiers=equal))


def test_more_iterations_than_steps(files):
    with pytest.raises(PlanError, match="--train-iters 3 exceeds the plan's 2 steps"):
        checks.check_plans(megatron(train_iters=3), loaded(files))


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"num_experts": 4}, "--num-experts"),
        ({"overlap_grad_reduce": True}, "--overlap-grad-reduce"),
        ({"overlap_param_gather": True}, "--overlap-param-gather"),
        ({"pipeline_model_parallel_size": 2, "world_size": 4}, "--pipeline-model-parallel-size"),
    ],
)
def test_what_would_make_ranks_of_a_gang_schedule_meet_is_refused(files, changes, flag):
    checks.check_plans(megatron(), loaded(files, schedule="gang"))
    with pytest.raises(ConfigError, match=f"{flag} cannot be used with a plan of schedule 'gang'"):
        checks.check_plans(megatron(**changes), loaded(files, schedule="gang"))


def test_pipeline_stages_of_unequal_local_tokens(files):
    equal = (Tier(packing_length=32), Tier(packing_length=64, cp_degree=2))
    stages = {"pipeline_model_parallel_size": 2, "world_size": 4}
    interleaved = megatron(**stages, virtual_pipeline_model_parallel_size=2)
    for args in (megatron(**stages), interleaved):
        checks.check_plans(args, loaded(files, tiers=equal))
        assert not checks.shapes_vary(args, loaded(files, tiers=equal))
    checks.check_plans(megatron(**stages), loaded(files))
    assert checks.shapes_vary(megatron(**stages), loaded(files)) and not checks.shapes_vary(megatron(), loaded(files))
    with pytest.raises(ConfigError, match=r"same local tokens \(they have \[16, 32\].* or leave out --num-layers-per"):
        checks.check_plans(interleaved, loaded(files))
    experts = megatron(**stages, num_experts=8, moe_token_dispatcher_type="allgather")
    with pytest.raises(ConfigError, match=r"--moe-token-dispatcher-type allgather .*: use alltoall"):
        checks.check_plans(experts, loaded(files))


def test_held_out_tiers_count_too(files):
    stages = megatron(pipeline_model_parallel_size=2, world_size=4)
    equal = loaded(files, tiers=(Tier(packing_length=32), Tier(packing_length=64, cp_degree=2)))
    assert checks.shapes_vary(stages, dataclasses.replace(equal, valid=loaded(files).train))
