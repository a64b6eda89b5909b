"""How fast this CPU is just now: a fixed piece of work, timed before and after whatever is measured.

The cores of a shared machine change their speed from second to second, with other guests, caches and clock rates. On
two cores of a virtual machine on which nothing else ran, process CPU times of the same work had a coefficient of
variation of 10 to 13% in windows of 15 to 140 ms, still 4% in windows of 4 s. The work here slows down alike.
"""

import time

import torch
import torch.nn.functional as F

ROWS, WIDTH, REPEATS = 512, 384, 3
"""About 20 ms: products, attention and element-wise work in the proportions of a small transformer."""


class Yardstick:
    """Turns CPU seconds into those of a machine that takes `reference` seconds for the yardstick."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self._rows = torch.randn(ROWS, WIDTH, generator=random)
        self._weight = torch.randn(WIDTH, WIDTH, generator=random)
        self._heads = torch.randn(1, 4, ROWS, 32, generator=random)
        self._long = torch.randn(2**19, generator=random)
        readings = [self.read() for _ in range(30)]
        self.reference = float(torch.tensor(readings[10:]).median())  # the first ones warm up

    @torch.no_grad()
    def read(self) -> float:
        """CPU seconds of this thread for the work, now."""
        begun = time.thread_time()
        for _ in range(REPEATS):
            F.silu(self._rows @ self._weight) @ self._weight
            F.scaled_dot_product_attention(self._heads, self._heads, self._heads, is_causal=True)
            (self._long * 1.5 + self._long).sum()
        return time.thread_time() - begun

    def corrected(self, seconds: float, before: float, after: float) -> float:
        """What `seconds` between two readings would have been at the reference speed."""
        return seconds * 2 * self.reference / (before + after)
