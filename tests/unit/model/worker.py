"""Runs in a process of its own on one gloo rank: the recompute switch and context capture on real tiny models, fp64.

Prints {"cases": {name: error or ""}, "gradients": {model: {policy: differs}}, "bytes": {model: {policy: saved bytes}}}.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402

from megatron_hbp.errors import ConfigError  # noqa: E402
from megatron_hbp.feed.feed import MicroBatch  # noqa: E402
from megatron_hbp.feed.forward import make_forward_step  # noqa: E402
from megatron_hbp.model.context import bind, current, on_bind  # noqa: E402
from megatron_hbp.model.recompute import FLAGS, RecomputeSwitch, install_context_capture  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.unit.model.packs import micro_batch_of  # noqa: E402

LENGTHS = [17, 5, 40, 1]
MODULES = {
    "dense": ("core_attn", "layernorm", "mlp"),
    "moe": ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"),
}
FULL = Recompute(granularity="full", num_layers=3)


def selective(*modules: str) -> Recompute:
    return Recompute(granularity="selective", modules=modules)


def policies(kind: str) -> dict[str, Recompute]:
    return {
        "none": Recompute(),
        **{name: selective(name) for name in MODULES[kind]},
        "all": selective(*(name for name in MODULES[kind] if name not in ("mlp", "moe"))),
        "full1": Recompute(granularity="full", num_layers=1),
        "full3": FULL,
    }


def micro_batch(policy: Recompute, lengths=LENGTHS, seed: int = 0) -> MicroBatch:
    return micro_batch_of(lengths, recompute=policy, vocabulary=VOCABULARY, seed=seed)


def forward(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    losses, loss_sum = make_forward_step()(iter([batch]), model)
    return loss_sum(losses)[0]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Take the gradients, leave zeros."""
    found = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    model.zero_grad_buffer()
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def one_by_one(model: torch.nn.Module, *batches: MicroBatch) -> dict[str, torch.Tensor]:
    with on_bind(RecomputeSwitch([model])):
        for batch in batches:
            forward(model, batch).backward()
    return gradients(model)


def saved_bytes(model: torch.nn.Module, policy: Recompute) -> int:
    """Bytes that the backward still holds when the forward has ended, parameters not counted."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with on_bind(RecomputeSwitch([model])), hooks:
        total = forward(model, micro_batch(policy))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    total.backward()
    gradients(model)
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


# ---------------------------------------------------------------- cases


def switch_sets_and_clears(models) -> None:
    for kind, model in models.items():
        switch = RecomputeSwitch([model])
        assert {name for _, _, name in switch._owners} == set(MODULES[kind]), {name for _, _, name in switch._owners}
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        for policy in [*policies(kind).values(), *reversed(policies(kind).values())]:
            switch.set(policy)
            for module, flag, name in switch._owners:
                assert flag in FLAGS[name] and getattr(module, flag) is (name in policy.modules), (policy, name)
            full = policy.granularity == "full"
            expected = (policy.granularity, "block" if full else None, policy.num_layers if full else None)
            for config in configs:
                found = (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
                assert found == expected, (policy, found)


def switch_knows_configs_that_were_copied(models) -> None:
    model = models["moe"]
    configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert len(configs) > 1  # else this case shows nothing
    assert len(RecomputeSwitch([model])._configs) == len(configs)


def policies_are_checked_when_the_model_is_built(models) -> None:
    """What Megatron-LM takes and does not do: modules that the model has not, more layers than it has."""
    chunks = [models["dense"]]
    assert RecomputeSwitch().take(chunks, {f"tier {name}": each for name, each in policies("dense").items()}) is chunks
    fused = build("dense")[0]  # as Transformer Engine builds it: the norms belong to the linear layers after them
    for layer in fused.module.decoder.layers:
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp()
    for chunk, who, policy, parts in (
        (models["dense"], "tier A", selective("core_attn", "moe"), ("'moe'", "core_attn, layernorm, mlp")),
        (fused, "tier B", selective("layernorm"), ("'layernorm'", "it has core_attn, mlp")),
        (models["dense"], "tier C", Recompute(granularity="full", num_layers=4), ("4 layers", "the model's 3")),
    ):
        try:
            RecomputeSwitch().take([chunk], {"tier 0": Recompute(), who: policy})
        except ConfigError as error:
            assert error.is_everywhere and all(part in str(error) for part in (who, *parts)), error
        else:
            raise AssertionError(f"{who} was taken")


def a_policy_that_is_set_costs_nothing(models) -> None:
    model = models["dense"]
    switch = RecomputeSwitch([model])
    switch.set(FULL)
    model.config.recompute_num_layers = "untouched"
    switch.set(FULL)
    assert model.config.recompute_num_layers == "untouched"
    switch.set(Recompute())
    assert model.config.recompute_num_layers is None


def stages_share_the_layers(models) -> None:
    """Megatron-LM counts a chunk's layers, a tier those of the model: 3 are 1 in each of four chunks."""
    config = models["dense"].config
    for stages, chunks, expected in ((2, None, 2), (2, 2, 1), (1, None, 3)):
        config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size = stages, chunks
        RecomputeSwitch([models["dense"]]).set(FULL)
        assert config.recompute_num_layers == expected, (stages, chunks, config.recompute_num_layers)


def capture_is_installed_once(models) -> None:
    before = tensor_parallel.checkpoint, tensor_parallel.CheckpointWithoutOutput
    install_context_capture()
    assert before == (tensor_parallel.checkpoint, tensor_parallel.CheckpointWithoutOutput)


def both_checkpoints_keep_the_context(models) -> None:
    a, b = (micro_batch(Recompute(), seed=seed).context for seed in (1, 2))
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(current())
        return x.exp()

    with bind(a):
        kept = tensor_parallel.checkpoint(layer, False, torch.ones(2, requires_grad=True))
        discarding = tensor_parallel.CheckpointWithoutOutput()
        inner = discarding.checkpoint(layer, torch.ones(2, requires_grad=True))
        out = inner * inner
        discarding.discard_output_and_register_recompute(out)
    with bind(b):
        kept.sum().backward()
        out.sum().backward()
    assert len(seen) == 4 and all(context is a for context in seen)


def backward_recomputes_in_the_forwards_context(models) -> None:
    """The order of 1F1B: forward A, forward B, backward A (B current or none), backward B."""
    for kind, model in models.items():
        for name, policy in policies(kind).items():
            a, b = micro_batch(policy), micro_batch(FULL, lengths=[30, 33], seed=1)
            expected = one_by_one(model, a, b)
            with on_bind(RecomputeSwitch([model])):
                first, second = forward(model, a), forward(model, b)
                with bind(b.context):
                    first.backward()
                second.backward()
            assert same(gradients(model), expected), (kind, name)


def fused_rotary_of_latent_attention_is_off(models) -> None:
    """Its kernels would rotate by their own table; without YaRN Megatron-LM's config refuses them itself."""
    fused, plain = (build("moe", rope_type="yarn", apply_rope_fusion=fusion)[0] for fusion in (True, False))
    assert not fused.config.apply_rope_fusion
    assert torch.equal(forward(fused, micro_batch(Recompute())), forward(plain, micro_batch(Recompute())))


def fused_rotary_of_grouped_queries_takes_local_positions(models) -> None:
    """Megatron-LM hands Transformer Engine's kernel (sbhd: row i of the frequencies for token i) one row a token."""
    rotated = []

    def emulated(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool) -> torch.Tensor:
        assert freqs.shape == (len(t), 1, 1, t.shape[-1]) and freqs.dtype == torch.float32
        rotated.append(len(t))
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)

    with mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", emulated):
        fused = build("dense", apply_rope_fusion=True)[0]
        loss = forward(fused, micro_batch(Recompute()))
    assert rotated == [sum(LENGTHS)] * 2 * fused.config.num_layers
    assert torch.equal(loss, forward(models["dense"], micro_batch(Recompute())))


CASES: tuple[Callable[[dict], None], ...] = (
    switch_sets_and_clears,
    switch_knows_configs_that_were_copied,
    policies_are_checked_when_the_model_is_built,
    a_policy_that_is_set_costs_nothing,
    stages_share_the_layers,
    capture_is_installed_once,
    both_checkpoints_keep_the_context,
    backward_recomputes_in_the_forwards_context,
    fused_rotary_of_latent_attention_is_off,
    fused_rotary_of_grouped_queries_takes_local_positions,
)


def outcome(case: Callable[[dict], None], models: dict) -> str:
    try:
        case(models)
    except Exception:
        return traceback.format_exc()
    return ""


def main(store_path: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store_path, 1), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    install_context_capture()
    models = {kind: build(kind)[0] for kind in MODULES}
    for model in models.values():
        model.train()
        model.zero_grad_buffer()
    results: dict = {"cases": {case.__name__: outcome(case, models) for case in CASES}}
    plain = {kind: one_by_one(model, micro_batch(Recompute())) for kind, model in models.items()}
    results["gradients"] = {
        kind: {name: not same(one_by_one(model, micro_batch(p)), plain[kind]) for name, p in policies(kind).items()}
        for kind, model in models.items()
    }
    results["bytes"] = {
        kind: {name: saved_bytes(model, policy) for name, policy in policies(kind).items()}
        for kind, model in models.items()
    }
    print("RESULT " + json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
