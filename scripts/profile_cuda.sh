#!/usr/bin/env bash
# Profile a 1B-class dense model and a small MLA + MoE model at 4K to 64K on the CUDA devices of one node.
#
#   scripts/profile_cuda.sh [RANKS] [FOLDER]
set -euo pipefail
ranks=${1:-8} folder=${2:-out/profile}
mkdir -p "$folder"

common=(
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --vocab-size 128256 --bf16 --use-distributed-optimizer --seed 1
)
# Llama-3.2-1B: 16 layers, hidden 2,048, 32 heads of 64, 8 KV heads
dense=(
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --rotary-base 500000
)
# a small DeepSeek-V2: latent attention, 16 routed experts of which 4 are visited, one shared, the first layer dense
moe=(
    --num-layers 12 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 16
    --multi-latent-attention --q-lora-rank 384 --kv-lora-rank 256 --qk-head-dim 64 --qk-pos-emb-head-dim 32
    --v-head-dim 64 --qk-layernorm --rope-type rope
    --num-experts 16 --moe-layer-freq '([0]*1+[1]*11)' --moe-ffn-hidden-size 768 --moe-router-topk 4
    --moe-shared-expert-intermediate-size 768 --moe-router-pre-softmax --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0 --moe-token-dispatcher-type alltoall --moe-grouped-gemm
    --expert-model-parallel-size "$((ranks < 4 ? ranks : 4))"
)
lengths=4096,8192,16384,32768,65536

.venv/bin/hbp profile --nproc-per-node "$ranks" --lengths "$lengths" --recompute none,full8,full16,sel=core_attn \
    --out "$folder/dense-1b.json" -- "${dense[@]}" "${common[@]}"
.venv/bin/hbp profile --nproc-per-node "$ranks" --lengths "$lengths" --recompute none,full6,full12,sel=mla_up_proj \
    --out "$folder/mla-moe.json" -- "${moe[@]}" "${common[@]}"
