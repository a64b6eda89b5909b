"""The two small models of the demo, as Megatron-LM flags."""

_COMMON = """
    --hidden-size 128 --num-attention-heads 4 --swiglu --normalization RMSNorm --norm-epsilon 1e-5
    --disable-bias-linear --untie-embeddings-and-output-weights --init-method-std 0.02
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 3 --adam-beta2 0.95 --weight-decay 0 --clip-grad 1
    --use-distributed-optimizer --seed 1
"""

MODELS: dict[str, list[str]] = {
    # Llama-style: grouped-query attention, SwiGLU, RMSNorm, rotary positions
    "dense": f"{_COMMON} --num-layers 2 --ffn-hidden-size 384 --group-query-attention --num-query-groups 2".split(),
    # DeepSeek-V2-style: latent attention, one shared and eight routed experts, first layer dense
    "deepseek-v2": f"""{_COMMON} --num-layers 2 --ffn-hidden-size 384
        --multi-latent-attention --q-lora-rank 64 --kv-lora-rank 32 --qk-head-dim 24 --qk-pos-emb-head-dim 8
        --v-head-dim 32 --qk-layernorm --rope-type rope
        --num-experts 8 --moe-layer-freq [0]*1+[1]*1 --moe-ffn-hidden-size 96 --moe-router-topk 2
        --moe-shared-expert-intermediate-size 96 --moe-router-pre-softmax --moe-router-load-balancing-type none
        --moe-aux-loss-coeff 0 --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2
    """.split(),
}
"""Name -> flags for pretrain_hbp.py."""
