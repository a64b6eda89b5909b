# shellcheck shell=bash disable=SC2034  # sourced for its array
# Llama-3.1-70B: the model's Megatron-LM flags, from megatron_hbp/families, and flags of the run.
#
#   source recipes/llama3.1-70b.sh       # HBP_PYTHON names the interpreter; default: python
#   sbatch ... scripts/slurm/train.sbatch -- "${MODEL_FLAGS[@]}" --hbp-plan PLAN --hbp-store STORE ...
#
# Tiers for 256 GPUs of 80 GB, 8 GPUs (TP 8) per data-parallel rank:
#   hbp plan --ranks 32 --tp 8 --cost llama3.1-70b-h100-tp8 --tiers 32768:cp1:full68,131072:cp4:full68 ...
mapfile -t MODEL_FLAGS < <("${HBP_PYTHON:-python}" -m megatron_hbp.families llama3.1-70b)
[[ ${#MODEL_FLAGS[@]} -gt 0 ]] || {
    echo "recipes/llama3.1-70b.sh: ${HBP_PYTHON:-python} cannot run megatron_hbp; set HBP_PYTHON" >&2
    return 78
}
MODEL_FLAGS+=(--bf16 --use-distributed-optimizer --tensor-model-parallel-size 8 --sequence-parallel)
