"""Recompute by micro-batch: a tier's policy, switched on the built model.

Megatron-LM reads full recompute (granularity, method, number of layers) from the config at every forward, and selective
recompute from flags that each module sets on itself at construction. `RecomputeSwitch` sets both. Full and selective
together would nest, so a policy is one or the other.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_hbp.errors import ConfigError, everywhere
from megatron_hbp.model.context import MicroBatchContext, capture_context
from megatron_hbp.planning.core.tiers import Recompute

# Recompute module (as in --recompute-modules) -> the flags its owners read at forward, as of megatron-core 0.19.2.
FLAGS: dict[str, tuple[str, ...]] = {
    "core_attn": ("checkpoint_core_attention",),
    "mla_up_proj": ("recompute_up_proj",),
    "layernorm": ("recompute_input_layernorm", "recompute_pre_mlp_layernorm"),
    "mlp": ("recompute_mlp",),
    "moe": ("moe_layer_recompute",),
    "shared_experts": ("shared_experts_recompute",),
    "moe_act": ("activation_recompute",),
}


class RecomputeSwitch:
    """Sets the recompute policy of a model's chunks; setting the policy that is already set costs nothing."""

    def __init__(self, chunks: Iterable[torch.nn.Module] = ()):
        """For `chunks`, and those that `take` brings later: a run has its switch before it has its model."""
        self._policy: Recompute | None = None
        self._chosen: frozenset[str] | None = None
        self._configs: list[Any] = []
        self._owners: list[tuple[torch.nn.Module, str, str]] = []
        # module name -> (attributes of an owner, flag): writing there takes 10 us for 32 layers, Module.__setattr__ 300
        self._flags: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._add(chunks)

    def take(self, chunks: list[torch.nn.Module], policies: Mapping[str, Recompute]) -> list[torch.nn.Module]:
        """Add the chunks of a model that has just been built, check the policies of the run, and return the chunks.

        A hook of Megatron-LM's model config (`pre_wrap_hooks`); raises what `check` raises.
        """
        self._add(chunks)
        self.check(policies)
        return chunks

    def _add(self, chunks: Iterable[torch.nn.Module]) -> None:
        for chunk in chunks:
            for module in chunk.modules():
                config = getattr(module, "config", None)
                if config is not None and all(config is not known for known in self._configs):
                    self._configs.append(config)  # some modules hold a deep copy of their own
                for name, flags in FLAGS.items():
                    for flag in flags:
                        if _owns(module, flag):
                            self._owners.append((module, flag, name))
                            self._flags.setdefault(name, []).append((module.__dict__, flag))

    def check(self, policies: Mapping[str, Recompute]) -> None:
        """Raise ConfigError on all ranks where a policy is none for this model. Collective over the pipeline stages.

        Megatron-LM takes the name of a module that the model lacks, and recomputes nothing.

        Args:
            policies: by what a message is to call them, for example "tier 16384:cp1:sel=mlp".
        """
        every = [{name for _, _, name in self._owners}]
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:  # stages differ: the first layers of a DeepSeek are dense
            here, every = every[0], every * group.size()
            dist.all_gather_object(every, here, group=group)
        available = sorted(set().union(*every))
        for who, policy in policies.items():
            for name in policy.modules:
                if name not in available:
                    raise everywhere(
                        ConfigError(
                            f"{who} recomputes {name!r}, which this model does not have as a module of its own; it has "
                            f"{', '.join(available)}"
                        )
                    )
            if policy.num_layers > (layers := self._configs[0].num_layers):
                raise everywhere(
                    ConfigError(f"{who} recomputes {policy.num_layers} layers, which is more than the model's {layers}")
                )

    def __call__(self, context: MicroBatchContext) -> None:
        """Set the policy of a micro-batch that becomes current."""
        self.set(context.tier.recompute)

    def set(self, policy: Recompute) -> None:
        """Set `policy` on all configs and flags."""
        if policy == self._policy:
            return
        full = policy.granularity == "full" and policy.num_layers > 0
        settings = {
            "recompute_granularity": policy.granularity if full or policy.granularity != "full" else None,
            "recompute_method": "block" if full else None,
        }
        for config in self._configs:
            # Megatron-LM counts layers of a chunk, tiers and cost models those of the whole model
            chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
            vars(config).update(settings, recompute_num_layers=-(-policy.num_layers // chunks) if full else None)
        chosen = frozenset(policy.modules if policy.granularity == "selective" else ())
        changed = self._flags if self._chosen is None else chosen ^ self._chosen
        for name in changed:
            for attributes, flag in self._flags.get(name, ()):
                attributes[flag] = name in chosen
        self._policy, self._chosen = policy, chosen


def _owns(module: torch.nn.Module, flag: str) -> bool:
    """True where the module has the flag and the part that it recomputes."""
    if flag not in module.__dict__:
        return False
    norm = {"recompute_input_layernorm": "input_layernorm", "recompute_pre_mlp_layernorm": "pre_mlp_layernorm"}
    if flag in norm:
        return any(True for _ in getattr(module, norm[flag]).parameters())  # IdentityOp has none
    if flag == "recompute_mlp":
        return not getattr(module, "is_moe_layer", False)
    if flag == "shared_experts_recompute":
        return getattr(module, "use_shared_expert", False)
    return True


def install_context_capture() -> None:
    """Make every recomputed function of Megatron-LM keep its micro-batch's context (see model/context.py).

    All recompute passes through three entries: `tensor_parallel.checkpoint` (full, core_attn, mlp, moe,
    shared_experts), `tensor_parallel.CheckpointWithoutOutput` (layernorm, mla_up_proj, moe_act) and Transformer
    Engine's `te_checkpoint`. Callers reach the first two through the package's attribute; the third is imported by
    name. Idempotent.
    """
    if getattr(tensor_parallel.checkpoint, "captures_context", False):
        return
    plain_checkpoint = tensor_parallel.checkpoint

    @functools.wraps(plain_checkpoint)
    def checkpoint(function: Any, distribute_saved_activations: bool, *args: Any) -> Any:
        return plain_checkpoint(capture_context(function), distribute_saved_activations, *args)

    class CheckpointWithoutOutput(tensor_parallel.CheckpointWithoutOutput):
        """Megatron-LM's, with the context kept."""

        def checkpoint(self, run_function: Any, *args: Any) -> Any:
            return super().checkpoint(capture_context(run_function), *args)

    checkpoint.captures_context = True  # type: ignore[attr-defined]
    tensor_parallel.checkpoint = checkpoint
    tensor_parallel.CheckpointWithoutOutput = CheckpointWithoutOutput
    _capture_te_checkpoint()


def _capture_te_checkpoint() -> None:
    import sys

    for name, module in list(sys.modules.items()):
        plain = name.startswith("megatron.core") and getattr(module, "te_checkpoint", None)
        if plain:

            def te_checkpoint(forward_func: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                return plain(capture_context(forward_func), *args, **kwargs)

            module.te_checkpoint = te_checkpoint  # type: ignore[attr-defined]
