"""Which exchange every tier runs with: the tier's own, a flag's, or the one with the fewest modelled seconds."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_hbp.errors import ConfigError
from megatron_hbp.families import model_of_args
from megatron_hbp.model import kernels
from megatron_hbp.model.spec import why_no_latents
from megatron_hbp.planning.core.exchanges import AUTO, EXCHANGES, usable
from megatron_hbp.planning.core.machine import H100, Machine
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Kernel, Tier
from megatron_hbp.planning.cost.exchange import choose_exchange
from megatron_hbp.training.options import HbpOptions


def machine_of(args: Any) -> Machine:
    """The cluster as far as this process knows it: ranks in a node, and the link speeds of the flags."""
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    return replace(
        H100,
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
            model_of_args(args).attention.on_tensor_parallel_rank(args.tensor_model_parallel_size),
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
    plan: Plan, shape: AttentionShape, machine: Machine | None, *, exchange: str | None, kernel: Kernel | None,
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
    if no_latents:
        shape = replace(shape, kv_latent=0)
    tiers, lines = [], []
    for index, tier in enumerate(plan.tiers):
        tier = replace(tier, exchange=exchange or tier.exchange, kernel=kernel or tier.kernel)
        if tier.cp_degree == 1:
            tiers.append(replace(tier, exchange="a2a", layout=AUTO))
            continue
        if tier.exchange == AUTO and machine is None:
            tier = replace(tier, exchange=usable(shape, tier.cp_degree)[0].name)
            reason = f"{tier.exchange} (no CUDA device to price others for)"
        elif tier.exchange == AUTO:
            assert machine is not None
            chosen, reason = _cheapest(tier, plan.pack_squares[plan.pack_tier == index], shape, machine)
            tier = replace(tier, exchange=chosen)
        elif why := EXCHANGES[tier.exchange].refusal(shape, tier.cp_degree):
            if EXCHANGES[tier.exchange].needs_latents and no_latents:
                why = no_latents
            raise ConfigError(
                f"tier {tier}: exchange {tier.exchange} cannot be used: {why}; or leave the exchange out, or give "
                f"--hbp-exchange with one of {', '.join(each.name for each in usable(shape, tier.cp_degree))}"
            )
        else:
            reason = f"{tier.exchange} (as asked for)"
        tiers.append(tier)
        lines.append(f"tier {plan.tiers[index]}: exchange {reason}")
    return tuple(tiers), lines


def _cheapest(tier: Tier, squares: np.ndarray, shape: AttentionShape, machine: Machine) -> tuple[str, str]:
    """Name and reason; a pack of the tier is full and has the median of its packs' summed squares."""
    choice = choose_exchange(
        shape,
        cp_degree=tier.cp_degree,
        tokens=tier.packing_length,
        squares=float(np.median(squares)) if len(squares) else float(tier.packing_length),
        machine=machine,
        zigzag=tier.layout == "contiguous" or tier.packing_length % (2 * tier.cp_degree * tier.alignment) == 0,
    )
    if not choice.prices:
        raise ConfigError(
            f"tier {tier}: no exchange can be used: heads do not divide by its CP degree, and its packing length does "
            f"not by {2 * tier.cp_degree * tier.alignment} (mirrored slices); choose another packing length"
        )
    return choice.exchange, choice.reason
