"""Which exchange every tier runs with: the tier's own, a flag's, or the one with the fewest modelled seconds."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_hbp.errors import ConfigError
from megatron_hbp.model import kernels
from megatron_hbp.model.latents import LATENT
from megatron_hbp.model.spec import why_no_latents
from megatron_hbp.planning.exchange import AUTO, EXCHANGES, AttentionShape, Exchange, Machine, choose, refusal
from megatron_hbp.planning.plan import Plan
from megatron_hbp.planning.types import Kernel, Tier
from megatron_hbp.training.options import HbpOptions


def attention_shape(args: Any) -> AttentionShape:
    """Heads and widths of a whole layer, from Megatron-LM's arguments."""
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        return AttentionShape(
            num_query_heads=heads,
            num_kv_heads=heads,
            qk_width=args.qk_head_dim + args.qk_pos_emb_head_dim,
            v_width=args.v_head_dim,
            q_latent=args.q_lora_rank or args.hidden_size,
            kv_latent=args.kv_lora_rank,
            rope_width=args.qk_pos_emb_head_dim,
        )
    width = args.kv_channels or args.hidden_size // heads
    kv_heads = args.num_query_groups if args.group_query_attention else heads
    return AttentionShape(num_query_heads=heads, num_kv_heads=kv_heads, qk_width=width, v_width=width)


def machine_of(args: Any) -> Machine:
    """The cluster as far as this process knows it: ranks in a node, and the link speeds of the flags."""
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    return Machine(
        node_size=max(1, devices // args.tensor_model_parallel_size),
        node_bandwidth=args.hbp_node_bandwidth * 1e9,
        cluster_bandwidth=args.hbp_cluster_bandwidth * 1e9,
    )


def settle(args: Any, transformer: Any, options: HbpOptions) -> tuple[list[tuple[Tier, ...]], list[str]]:
    """The settled tiers of the training plan and of the held-out one, and lines for the log.

    Args:
        args: Megatron-LM's arguments.
        transformer: the model's TransformerConfig.
        options: ours.

    Raises:
        ConfigError: a named exchange or kernel cannot be used.
    """
    device = torch.device(torch.cuda.current_device())
    settled, said = [], []
    for part in (options.train, options.valid):
        if part is None:
            continue
        tiers, lines = settle_tiers(
            part.plan,
            attention_shape(args).on_tensor_parallel_rank(args.tensor_model_parallel_size),
            machine_of(args) if device.type == "cuda" else None,
            exchange=args.hbp_exchange,
            kernel=args.hbp_kernel,
            no_latents=why_no_latents(transformer),
        )
        for tier in tiers:
            kernels.choose(tier.kernel, device, args.params_dtype)
        settled.append(tiers)
        said += lines if part is options.train else []
    return settled, said


def settle_tiers(
    plan: Plan, shape: AttentionShape, machine: Machine | None, *, exchange: Exchange | None, kernel: Kernel | None,
    no_latents: str | None = None,
) -> tuple[tuple[Tier, ...], list[str]]:  # fmt: skip
    """The plan's tiers without an `auto` exchange, and a line for the log for each tier that exchanges.

    Args:
        plan: the schedule; its packs say how long the samples of a tier are.
        shape: attention on one tensor-parallel rank.
        machine: what exchanges are priced with; None without CUDA, where prices of GPUs would mislead: the first that
            can be used is taken (the ring's plain-torch blocks made the demo's MLA model three times as slow).
        exchange: overrides that of all tiers.
        kernel: overrides that of all tiers.
        no_latents: why the model cannot exchange latents, and what to do; None where it can.

    Raises:
        ConfigError: a named exchange cannot be used with this model and degree.
    """

    def refused(exchange: Exchange, cp_degree: int) -> str | None:
        return (no_latents if exchange in LATENT else None) or refusal(exchange, shape, cp_degree)

    if no_latents:
        shape = replace(shape, kv_latent=0)
    tiers, lines = [], []
    for index, tier in enumerate(plan.tiers):
        tier = replace(tier, exchange=exchange or tier.exchange, kernel=kernel or tier.kernel)
        if tier.cp_degree == 1:
            tiers.append(replace(tier, exchange="a2a", layout=AUTO))
            continue
        if tier.exchange == AUTO and machine is None:
            tier = replace(tier, exchange=next(e for e in EXCHANGES if not refused(e, tier.cp_degree)))
            reason = f"{tier.exchange} (no CUDA device to price others for)"
        elif tier.exchange == AUTO:
            assert machine is not None
            chosen, reason = _cheapest(tier, plan.pack_squares[plan.pack_tier == index], shape, machine)
            tier = replace(tier, exchange=chosen)
        elif why := refused(tier.exchange, tier.cp_degree):
            raise ConfigError(
                f"tier {tier}: exchange {tier.exchange} cannot be used: {why}; or leave the exchange out, or give "
                f"--hbp-exchange with one of {', '.join(e for e in EXCHANGES if not refused(e, tier.cp_degree))}"
            )
        else:
            reason = f"{tier.exchange} (as asked for)"
        tiers.append(tier)
        lines.append(f"tier {plan.tiers[index]}: exchange {reason}")
    return tuple(tiers), lines


def _cheapest(tier: Tier, squares: np.ndarray, shape: AttentionShape, machine: Machine) -> tuple[Exchange, str]:
    """Name and reason; a pack of the tier is full and has the median of its packs' summed squares."""
    choice = choose(
        shape,
        cp_degree=tier.cp_degree,
        tokens=tier.packing_length,
        squares=float(np.median(squares)) if len(squares) else float(tier.packing_length),
        machine=machine,
    )
    for price in choice.prices:
        try:  # zigzag wants packing lengths that twice the degree divides
            replace(tier, exchange=price.exchange)
        except ConfigError:
            continue
        return price.exchange, replace(choice, exchange=price.exchange).reason
    raise AssertionError("a2a and the contiguous layout suit every tier that another exchange suits")
