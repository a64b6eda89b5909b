"""Without a plan the entry point is plain Megatron-LM."""

import re
import shlex

PLAIN = shlex.split("""
    --mock-data --num-layers 1 --hidden-size 32 --num-attention-heads 4 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 8 --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer
    --vocab-size 64 --eval-iters 0 --eval-interval 100 --use-distributed-optimizer --attention-dropout 0
    --hidden-dropout 0 --log-interval 1
""")


def test_mock_data_trains(train, tmp_path):
    ended = train(*PLAIN, "--data-cache-path", tmp_path, ranks=2)

    assert ended.code == 0, ended.err[-3000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", ended.out)]
    assert len(losses) == 2
    assert 0 < losses[1] < losses[0] < 10  # log(64) is 4.2
    assert "Traceback" not in ended.out + ended.err
