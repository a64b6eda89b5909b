"""`python -m tests.unit.families.parse OUT.json`: what Megatron-LM's own parser and checks make of flags of families.

Without CUDA the platform layer is applied, which changes torch: a process of its own.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hbp.families import MODELS, model_flags, model_of_args
from megatron_hbp.platform import cpu

RUN = shlex.split(
    "--micro-batch-size 1 --seq-length 128 --max-position-embeddings 128 --train-iters 1 --bf16 --lr 1e-3 "
    "--tokenizer-type NullTokenizer --position-embedding-type rope"
)
TWO_KV_HEADS = shlex.split(
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --group-query-attention --num-query-groups 2 "
    "--ffn-hidden-size 1024 --swiglu --untie-embeddings-and-output-weights --tensor-model-parallel-size 8"
)
NO_GATE = shlex.split(
    "--num-layers 2 --hidden-size 512 --num-attention-heads 8 --num-experts 16 --moe-layer-freq 2"
)  # fmt: skip


def checked(flags: list[str], vocabulary: int) -> Any:
    """Arguments as training has them."""
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = ["x", *cpu.FLAGS, *RUN, "--vocab-size", str(vocabulary), *flags]
    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = vocabulary  # as the tokenizer, which is built next, sets it
    return args


def main(out: Path) -> None:
    """Write specifications from parsed and from checked arguments."""
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    cpu.apply()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

    def parsed(flags: list[str], vocabulary: int) -> Any:
        args = parser.parse_args(flags)
        args.padded_vocab_size = vocabulary
        return args

    found = {}
    for name, (spec, _) in MODELS.items():
        # grouped GEMMs require a CUDA device where they are checked, and say nothing of shapes
        flags = [flag for flag in model_flags(name) if flag != "--moe-grouped-gemm"]
        both = parsed(model_flags(name), spec.vocabulary), checked(flags, spec.vocabulary)
        found[name] = [asdict(model_of_args(args)) for args in both]
    found["two KV heads"] = [asdict(model_of_args(parsed(TWO_KV_HEADS, 1000)))]
    found["no gate"] = [asdict(model_of_args(checked(NO_GATE, 1000)))]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
