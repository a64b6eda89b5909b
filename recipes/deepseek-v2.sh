# shellcheck shell=bash disable=SC2034  # sourced for its array
# DeepSeek-V2 (236B): Megatron-LM flags of the model, compared with three public copies of its config.json.
# NOT RUN HERE: the developers have no machine that holds this model; only the flags' names are tested.
#
#   source recipes/deepseek-v2.sh
#   sbatch ... scripts/slurm/train.sbatch -- "${MODEL_FLAGS[@]}" --hbp-plan PLAN --hbp-store STORE ...
#
# A group of experts is scored by its best expert, as in the Hugging Face model, not by megatron-core's sum of its top
# experts (megatron_hbp/model/router.py). One of the three copies has mscale 1.0 instead of 0.707: see your checkpoint's.
MODEL_FLAGS=(
    --num-layers 60
    --hidden-size 5120
    --ffn-hidden-size 12288
    --num-attention-heads 128
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    # multi-head latent attention, with YaRN from 4K to 160K
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
    --rope-type yarn
    --rotary-base 10000
    --rotary-scaling-factor 40
    --mscale 0.707
    --mscale-all-dim 0.707
    # 160 routed experts in 8 groups, 6 of 3 groups chosen, 2 shared ones of 1,536 each; the first layer is dense
    --num-experts 160
    --moe-layer-freq '([0]*1+[1]*59)'
    --moe-ffn-hidden-size 1536
    --moe-shared-expert-intermediate-size 3072
    --moe-router-topk 6
    --moe-router-pre-softmax
    --moe-router-num-groups 8
    --moe-router-group-topk 3
    --moe-router-topk-scaling-factor 16
    --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm
    --bf16
    --use-distributed-optimizer
)
