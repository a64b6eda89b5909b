"""Train with Megatron-LM on a plan of `hbp plan`: torchrun pretrain_hbp.py [Megatron-LM flags] [--hbp-* flags]."""

from megatron_hbp.training.main import main

if __name__ == "__main__":
    main()
