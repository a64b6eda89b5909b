"""`python -m megatron_hbp.families MODEL`: the model's Megatron-LM flags, one word per line."""

import sys

from megatron_hbp.errors import ConfigError
from megatron_hbp.families import MODELS, model_flags

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in MODELS:
        print(f"families: name one of {', '.join(MODELS)}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    print("\n".join(model_flags(sys.argv[1])))
