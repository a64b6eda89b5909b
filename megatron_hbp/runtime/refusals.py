"""Megatron-LM's flags that have no meaning, or a wrong one, where micro-batches are packs of samples.

Gone through against the argument list of megatron-core 0.19.2. A flag of a table is refused where the command line sets
it to anything but what is implied, or the default; what the values of flags have to be together, options.py checks.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron_hbp.errors import ConfigError

Table = Mapping[str, tuple[str, ...]]
"""Reason -> flags."""

PACKED: Table = {
    "the CP degree changes between micro-batches": (
        "--context-parallel-size", "--hierarchical-context-parallel-sizes", "--max-seqlen-per-dp-cp-rank",
        "--hybrid-context-parallel", "--cp-comm-type",
    ),
    "multi-token prediction crosses the borders of samples in a pack": (
        "--mtp-num-layers", "--mtp-hybrid-override-pattern",
    ),
    "attention inside the samples of a pack is causal softmax attention over all of a sample, without dropout": (
        "--attention-dropout", "--softmax-type", "--window-size", "--window-attn-skip-freq", "--mrope-section",
        "--experimental-attention-variant", "--linear-attention-freq",
    ),
    "the model is built from this program's own layer specs": (
        "--spec", "--heterogeneous-layers-config-path", "--heterogeneous-layers-config-encoded-json",
        "--is-hybrid-model", "--hybrid-layer-pattern", "--hybrid-override-pattern",
    ),
    "shapes and recompute change between micro-batches": (
        "--cuda-graph-impl", "--cuda-graph-modules", "--cuda-graph-scope", "--enable-cuda-graph",
        "--external-cuda-graph",
    ),
    # transformer_engine.initialize_ub allocates for [seq_length, hidden] (training/initialize.py)
    "its buffers have one shape, and micro-batches have several": ("--tp-comm-overlap",),
    # combined_1f1b.py calls forward_step(..., return_schedule_plan=True) and runs the layers of one micro-batch between
    # those of another's backward, where only one micro-batch can be bound
    "it runs two micro-batches at a time, layer by layer, and a layer knows one": (
        "--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute", "--ep-overlap-early-attn-memory-release",
    ),
    # layers.py appends an input per forward, utils.py asserts as many gradients: recomputed chunks come twice
    "the loss computes its projection chunk by chunk, most chunks twice": (
        "--defer-embedding-wgrad-compute", "--wgrad-deferral-limit",
    ),
    "the loss is this program's own, on supervised tokens only": (
        "--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "--fp16-lm-cross-entropy", "--logits-save-dir",
        "--logits-load-dir",
    ),
    "supervised tokens come in any number, and its projection takes multiples of 32": ("--fp8-output-proj",),
    # TorchFullyShardedDataParallel inherits a scale_gradients that does nothing: no division by the token count
    "it does not divide gradients by the number of supervised tokens": ("--use-torch-fsdp2",),
    "it shards weights that the loss and exchanges of latents use outside their modules, which has not been tested": (
        "--use-megatron-fsdp",
    ),
    "its ranks read data of their own, and a plan gives a tensor-parallel group one pack": (
        "--tensor-parallel-num-weight-shards", "--expert-tensor-parallel-num-weight-shards",
    ),
    "a micro-batch is a pack": ("--micro-batch-size", "--batch-size", "--dataloader-type"),
    "flags are read from the command line": ("--yaml-cfg",),
}  # fmt: skip
"""Of any model that works on packs."""

_RECOMPUTE = (
    "--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules",
    "--recompute-activations", "--checkpoint-activations", "--moe-layer-recompute", "--distribute-saved-activations",
)  # fmt: skip

PLANNED: Table = {
    "the tiers set recompute: write it there, for example 16384:cp1:full28 or 16384:cp1:sel=core_attn": _RECOMPUTE,
    "the plan sets the batch of each step": (
        "--global-batch-size", "--rampup-batch-size", "--step-batch-size-schedule", "--decrease-batch-size-if-needed",
    ),
    "the tiers set the length of sequences": ("--seq-length", "--encoder-seq-length", "--decoder-seq-length"),
    "a plan counts steps, not samples: see --train-iters, --lr-decay-iters, --lr-warmup-iters": (
        "--train-samples", "--lr-decay-samples", "--lr-warmup-samples", "--lr-wsd-decay-samples",
    ),
    "a step that is skipped would shift the plan": ("--iterations-to-skip", "--result-rejected-tracker-filename"),
    "--hbp-valid-plan is what is evaluated": (
        "--eval-global-batch-size", "--eval-micro-batch-size", "--full-validation", "--multiple-validation-sets",
        "--validation-set-names",
    ),
    "the data come from --hbp-store": (
        "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--data-args-path",
        "--per-split-data-args-path", "--per-dataset-sequences-path", "--split", "--mock-data", "--sft", "--fim-data",
        "--phase-transition-iterations", "--data-cache-path", "--no-mmap-bin-files", "--dataloader-fast-cache-load",
        "--dataloader-defer-npy-index-mmap", "--object-storage-cache-path", "--mid-level-dataset-surplus",
        "--num-dataset-builder-threads", "--num-workers", "--sample-rate", "--reset-position-ids",
        "--reset-attention-mask", "--dataloader-inter-document-masking", "--eod-mask-loss",
        "--no-create-attention-mask-in-dataloader", "--perform-rl-step", "--rl-use-sequence-packing",
    ),
    "it takes samples times --seq-length for tokens: see --hbp-metrics": ("--log-progress",),
}  # fmt: skip
"""Of a run on a plan."""

PROFILED: Table = {
    "give --hbp-profile-recompute": _RECOMPUTE,
    "a profile trains nothing": ("--load", "--save", "--pretrained-checkpoint", "--use-checkpoint-args"),
    "times are those of the whole depth": (
        "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank",
    ),
}  # fmt: skip
"""Of a profile."""


def refuse(argv: Sequence[str], implied: Sequence[str], subject: str, *tables: Table) -> None:
    """Raise ConfigError where `argv` sets a flag of `tables` to another value than `implied` does, or its default.

    Args:
        argv: the user's command line.
        implied: flags that go before it.
        subject: what the flags cannot be used with.
        tables: reasons and flags.
    """
    actions, defaults = _actions(), megatron_defaults()
    ours, users = (_given(words) for words in (implied, argv))
    for table in tables:
        for reason, flags in table.items():
            for flag in flags:
                name = actions[flag].dest
                if name in users and users[name] != ours.get(name, defaults[name]):
                    raise ConfigError(f"{flag} cannot be used with {subject}: {reason}")


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """Megatron-LM's arguments that a command line sets, without defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = misuse  # type: ignore[method-assign]
    for action in {id(action): action for action in _actions().values()}.values():
        parser._add_action(action)
    return vars(parser.parse_known_args(list(argv))[0])


def misuse(message: str) -> NoReturn:
    """An argument parser's `error`: argparse's own prints its usage and leaves with 2."""
    raise ConfigError(f"{message}; see --help")


def megatron_defaults() -> dict[str, Any]:
    """Argument of Megatron-LM -> default."""
    return {action.dest: action.default for action in _parser()._actions}


@functools.cache
def _actions() -> dict[str, argparse.Action]:
    """Option of Megatron-LM -> its action, without a default."""
    actions = _parser()._actions
    for action in actions:
        action.default = argparse.SUPPRESS
    return {option: action for action in actions for option in action.option_strings}


def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
