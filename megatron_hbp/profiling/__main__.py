"""Run through torchrun on every rank: `python -m megatron_hbp.launch ... -m megatron_hbp.profiling [flags]`."""

from megatron_hbp.profiling.main import main

if __name__ == "__main__":
    main()
