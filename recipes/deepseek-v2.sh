# shellcheck shell=bash disable=SC2034  # sourced for its array
# DeepSeek-V2 (236B): the model's Megatron-LM flags, from megatron_hbp/families, and flags of the run.
#
#   source recipes/deepseek-v2.sh        # HBP_PYTHON names the interpreter; default: python
#   sbatch ... scripts/slurm/train.sbatch -- "${MODEL_FLAGS[@]}" --hbp-plan PLAN --hbp-store STORE ...
#
# Tiers for 256 GPUs of 80 GB, 8 GPUs (TP 2 x PP 4) per data-parallel rank:
#   hbp plan --ranks 32 --tp 2 --pp 4 --ep 32 --cost deepseek-v2-h100 --tiers 16384:cp1:full46,131072:cp8:full46 ...
mapfile -t MODEL_FLAGS < <("${HBP_PYTHON:-python}" -m megatron_hbp.families deepseek-v2)
[[ ${#MODEL_FLAGS[@]} -gt 0 ]] || {
    echo "recipes/deepseek-v2.sh: ${HBP_PYTHON:-python} cannot run megatron_hbp; set HBP_PYTHON" >&2
    return 78
}
MODEL_FLAGS+=(
    --bf16 --use-distributed-optimizer
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4
    --expert-model-parallel-size 32
)
