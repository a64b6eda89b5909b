"""Without a plan: what Megatron-LM's own GPT pre-training script hands to `pretrain()`, on the classes of the wheel.

The wheel ships the training loop but not the entry script, so the data sets, the batch and the loss of a plain run are
put together here; the flags mean what they mean there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models import GPTModelConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_hbp.errors import ConfigError
from megatron_hbp.runtime.setup import model_config

_BATCH = ("tokens", "labels", "loss_mask", "position_ids")


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test data sets from --data-path or --mock-data."""
    args = get_args()
    if args.sft or args.fim_data or args.hybrid_context_parallel:
        raise ConfigError("--sft, --fim-data and --hybrid-context-parallel are not offered: use --hbp-plan for chats")
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        partial(is_first_or_last_pipeline_stage, vp_stage),
        config,
    ).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """This rank's share of the next batch; every tensor-parallel rank reads it for itself."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys((*_BATCH, "attention_mask"))
    raw = next(data_iterator)
    keys = (*_BATCH, "attention_mask") if raw.get("attention_mask") is not None else _BATCH
    batch = {key: raw[key].cuda(non_blocking=True) for key in keys}
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group())
    return {"attention_mask": None, **batch}


def _loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    mask = loss_mask.view(-1).float()
    total, count = torch.sum(losses.view(-1).float() * mask), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack((total.detach(), count.float()))}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: GPTModel) -> tuple[torch.Tensor, Any]:
    """Megatron-LM's forward step over plain causal sequences."""
    batch = _get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(_loss, batch["loss_mask"])


def train_plain(args: Any) -> None:
    """Megatron-LM, with all of its flags and none of ours."""
    train(args, model_config(args), datasets_provider, forward_step)


def train(args: Any, model: GPTModelConfig, provider: Callable, forward_step: Callable) -> None:
    """Megatron-LM's training loop, from its arguments, a model config, a data-set provider and a forward step."""
    pretrain(pretrain_cfg_container_from_args(args, model), provider, ModelType.encoder_or_decoder, forward_step)
