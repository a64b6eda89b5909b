# shellcheck shell=bash disable=SC2034  # sourced for its array
# Llama-3.1-8B: Megatron-LM flags of the model, after the model's published config.json.
# NOT RUN HERE: the developers have no machine that holds this model; only the flags' names are tested.
#
#   source recipes/llama3.1-8b.sh
#   sbatch ... scripts/slurm/train.sbatch -- "${MODEL_FLAGS[@]}" --hbp-plan PLAN --hbp-store STORE ...
#
# Tiers to begin with, those of the paper for 32 H100: 16384 at CP 1 (28 layers recomputed), 131072 at CP 8.
MODEL_FLAGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --rotary-base 500000
    --use-rope-scaling
    --rope-scaling-factor 8
    --bf16
    --use-distributed-optimizer
)
