"""The MoE router of a packed micro-batch: balance losses that know its CP group, its padding and its samples.

Megatron-LM's router reduces its balance losses over the static TP x CP group, counts padding, and takes a whole pack
for one sequence. `PackedRouter` keeps its routing and defines the losses over *real tokens of the whole pack*, whatever
the CP degree and the padding.

Legend: `t` real tokens of a pack, T their number, T_j those of sample j, n and n_j the *supervised* ones, N the
supervised tokens of the whole step; `e` experts, E their number, K = top-k; p(t, e) the router's score of expert e for
token t (softmax over experts, or sigmoid normalised to 1), m(t, e) = 1 where e is among the K best of them.

    aux_loss      a E / (K T^2)   sum_e [ sum_t m(t, e) ] [ sum_t p(t, e) ]                 per pack, weighted n / N
    seq_aux_loss  a E / (K T_j^2) sum_e [ sum_{t in j} m(t, e) ] [ sum_{t in j} p(t, e) ]   per sample, n_j / N
    z_loss        z / T           sum_t logsumexp(logits_t)^2                               per pack, n / N

The weights of a step sum to one, so `a` means what it does in Megatron-LM (a mean over micro-batches), and a pack
without supervised tokens, a dummy among them, weighs nothing. m is a count: no gradient passes through it. Each rank
attaches the part of its own tokens (their p) with the pack's counts, so that the sum over ranks is the loss above.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter

from megatron_hbp.errors import ConfigError
from megatron_hbp.model import context as micro_batch


class PackedRouter(TopKRouter):
    """Megatron-LM's top-k router on packs; see the head of this module for its losses."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        kinds = [self.routing_type] if isinstance(self.routing_type, str) else list(self.routing_type)
        for kind in kinds:
            if kind not in ("none", "aux_loss", "seq_aux_loss"):
                raise ConfigError(
                    f"--moe-router-load-balancing-type {kind} is not defined for packs: "
                    f"use aux_loss, seq_aux_loss or none"
                )
        if self.config.moe_expert_capacity_factor is not None:
            raise ConfigError("--moe-expert-capacity-factor drops tokens by rank, which CP would change: leave it out")
        if self.config.moe_router_fusion:
            raise ConfigError("--moe-router-fusion cannot be used with --hbp-plan: the balance losses need the scores")

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [s, 1, E] -> probabilities and routing map [s, E], the losses attached to the probabilities.

        `padding_mask` is Megatron-LM's; the micro-batch's own is used.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        tokens = _LocalTokens.of_current(self.tp_group, logits.shape[0])
        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=self.router_replay,
            precomputed_indices=self._group_limited(logits),
        )
        if self.training and torch.is_grad_enabled():
            probs = self._with_losses(probs, logits, tokens)
            if self.enable_expert_bias:  # tokens that are padding, or that recompute sees again, do not count
                with torch.no_grad():
                    self.local_tokens_per_expert += (routing_map & tokens.real[:, None]).sum(dim=0)
        return probs, routing_map

    def _group_limited(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Experts [s, K] chosen as DeepSeek-V2 defines it: from the groups whose *best* expert scores highest.

        Megatron-LM scores a group by the sum of its K / groups best experts, DeepSeek-V3's rule. V2 has softmax scores
        and V3 sigmoid ones, which is how they are told apart; None leaves the choice to Megatron-LM.
        """
        groups, chosen = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if not chosen or self.score_function != "softmax":
            return None
        by_group = logits.detach().view(logits.shape[0], groups, -1)
        best = by_group.amax(dim=2).topk(chosen, dim=1).indices
        allowed = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, True)
        return by_group.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1).topk(self.topk, dim=1).indices

    def _with_losses(self, probs: torch.Tensor, logits: torch.Tensor, tokens: "_LocalTokens") -> torch.Tensor:
        num_experts = self.config.num_moe_experts
        wide = torch.promote_types(logits.dtype, torch.float32)  # fp64 stays fp64, for exactness tests
        pack_coeff, sample_coeff = self.get_aux_loss_coeff("aux_loss"), self.get_aux_loss_coeff("seq_aux_loss")
        if pack_coeff or sample_coeff:
            scores = self._scores(logits.to(wide)) * tokens.real[:, None]
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(self.topk, dim=1).indices, 1)
            chosen = chosen * tokens.real[:, None]
            num_samples = len(tokens.sample_tokens)

            def by_sample(values: torch.Tensor) -> torch.Tensor:
                return values.new_zeros(num_samples, num_experts).index_add(0, tokens.sample, values)

            counts, mass = by_sample(chosen), by_sample(scores)
            whole = tokens.summed(torch.stack((counts, mass.detach())))  # of the pack: counts, and p for the log
            if pack_coeff:
                factor = pack_coeff * num_experts / (self.topk * max(tokens.num_real, 1) ** 2)
                loss = factor * (whole[0].sum(0) * mass.sum(0)).sum()
                self._log("load_balancing_loss", factor * (whole[0].sum(0) * whole[1].sum(0)).sum() / pack_coeff)
                probs = MoEAuxLossAutoScaler.apply(probs, loss * tokens.num_supervised)
            if sample_coeff:
                sizes = tokens.sample_tokens.to(wide).clamp_min(1)
                factors = sample_coeff * num_experts / self.topk / sizes**2 * tokens.sample_supervised.to(wide)
                loss = (factors[:, None] * whole[0] * mass).sum()
                per_token = (factors[:, None] * whole[0] * whole[1]).sum() / max(tokens.num_supervised, 1)
                self._log("seq_load_balancing_loss", per_token / sample_coeff)
                probs = MoEAuxLossAutoScaler.apply(probs, loss)
        if self.config.moe_z_loss_coeff is not None:
            squares = (torch.logsumexp(logits.to(wide), dim=1) ** 2 * tokens.real).sum()
            loss = squares * self.config.moe_z_loss_coeff / max(tokens.num_real, 1)
            self._log("z_loss", tokens.summed(squares.detach()) / max(tokens.num_real, 1))
            probs = MoEAuxLossAutoScaler.apply(probs, loss * tokens.num_supervised)
        return probs

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.score_function == "softmax":
            return torch.softmax(logits, dim=1)
        raw = torch.sigmoid(logits) if self.score_function == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
        return raw / (raw.sum(dim=1, keepdim=True) + 1e-20)

    def _log(self, name: str, value: torch.Tensor) -> None:
        get_moe_metrics_tracker().record(name, value, self.layer_number, self.config.num_layers)


class _LocalTokens:
    """What the router has to know of the tokens that it sees on this rank."""

    def __init__(self, tp_group: dist.ProcessGroup | None, part: slice):
        context = micro_batch.current()
        self._groups = [g for g in (context.cp_group, tp_group) if g is not None and dist.get_world_size(g) > 1]
        self.real = context.is_real[part]
        """bool [s]: not padding."""
        self.sample = context.sample_index[part]
        """int64 [s]: index of the token's sample in the pack; padding has that of the last sample."""
        self.sample_tokens = context.sample_tokens
        """int64 [samples]: T_j."""
        self.sample_supervised = context.sample_supervised
        """int64 [samples]: n_j."""
        self.num_real = context.num_real_tokens
        self.num_supervised = context.num_supervised_tokens

    @staticmethod
    def of_current(tp_group: dist.ProcessGroup, num_tokens: int) -> "_LocalTokens":
        """Those of the bound micro-batch; under sequence parallelism a router sees one of TP equal parts of a slice."""
        total = micro_batch.current().is_real.shape[0]
        rank = dist.get_rank(tp_group) if num_tokens < total else 0
        part = slice(rank * num_tokens, (rank + 1) * num_tokens)
        return _LocalTokens(tp_group if num_tokens < total else None, part)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the ranks that share the pack; no gradient."""
        values = values.detach().clone()
        for group in self._groups:
            dist.all_reduce(values, group=group)
        return values
