# shellcheck shell=bash disable=SC2034  # sourced for its array
# Llama-3.1-8B: the model's Megatron-LM flags, from megatron_hbp/families, and flags of the run.
#
#   source recipes/llama3.1-8b.sh        # HBP_PYTHON names the interpreter; default: python
#   sbatch ... scripts/slurm/train.sbatch -- "${MODEL_FLAGS[@]}" --hbp-plan PLAN --hbp-store STORE ...
#
# Tiers for 8 or more GPUs of 80 GB, one GPU per data-parallel rank (those of the paper for 32 H100):
#   hbp plan --ranks 8 --tiers 16384:cp1:full28,131072:cp8:full28 ...
mapfile -t MODEL_FLAGS < <("${HBP_PYTHON:-python}" -m megatron_hbp.families llama3.1-8b)
[[ ${#MODEL_FLAGS[@]} -gt 0 ]] || {
    echo "recipes/llama3.1-8b.sh: ${HBP_PYTHON:-python} cannot run megatron_hbp; set HBP_PYTHON" >&2
    return 78
}
MODEL_FLAGS+=(--bf16 --use-distributed-optimizer)
