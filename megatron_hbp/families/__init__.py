"""Model families: what Megatron-LM's flags say of a model beside its shapes, one module per family.

    ModelSpec --model_flags--> Megatron-LM's flags --parser--> args --model_of_args--> ModelSpec

`python -m megatron_hbp.families llama3.1-8b` prints the flags of a model that is described here, one word per line; the
recipes are made from it. To add a family: a module with a `Family`, and its models in `MODELS`.
"""

from megatron_hbp.families.deepseek_v2 import DEEPSEEK_V2_FAMILY
from megatron_hbp.families.flags import Family, model_of_args, shape_flags
from megatron_hbp.families.llama import LLAMA_3_1
from megatron_hbp.planning.core.model import ModelSpec
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2, LLAMA_8B, LLAMA_70B

MODELS: dict[str, tuple[ModelSpec, Family]] = {
    LLAMA_8B.name: (LLAMA_8B, LLAMA_3_1),
    LLAMA_70B.name: (LLAMA_70B, LLAMA_3_1),
    DEEPSEEK_V2.name: (DEEPSEEK_V2, DEEPSEEK_V2_FAMILY),
}
"""Model -> its description and family."""


def model_flags(name: str) -> list[str]:
    """Megatron-LM's flags of model `name`."""
    spec, family = MODELS[name]
    return [*shape_flags(spec), *family.flags]


__all__ = ["MODELS", "Family", "model_flags", "model_of_args", "shape_flags"]
