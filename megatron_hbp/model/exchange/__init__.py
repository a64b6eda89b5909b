"""What the ranks of a context-parallel group exchange in attention; planning/exchange.py has the table of costs.

Every exchange answers the same question: the attention of the queries that lie here, over the shared samples.

    finish = start(q [x_r, h, d], k [x_r, k, d], v [x_r, k, dv], shared, group)
    finish(kernel, scale) -> [x_r, h, dv]

x_r are this rank's tokens of the shared samples (model/split.py).
"""
