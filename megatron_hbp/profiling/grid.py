"""Which rows to run, and in which order: what needs least memory first, so that what cannot fit is seen coming."""

from collections.abc import Sequence
from typing import Any

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.tiers import Recompute
from megatron_hbp.planning.cost.profile_table import SHAPES, Setting

LEAST_LOCAL_TOKENS = 64
"""Settings with fewer tokens on a rank are left out: launches and latencies alone."""


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Whole positive numbers, comma-separated, growing. Raises ConfigError naming the flag."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag} {text!r}: whole numbers above 0, comma-separated, for example 4096,8192")
    return tuple(sorted({int(part) for part in parts}))


def parse_policies(text: str | None, num_layers: int) -> tuple[Recompute, ...]:
    """Recompute policies as tiers write them, comma-separated; without `text` none, half of the layers, and all.

    Raises ConfigError for an unknown one, or more layers than the model has.
    """
    if text is None:
        text = ",".join(["none", *(f"full{n}" for n in sorted({-(-num_layers // 2), num_layers}))])
    policies = []
    for word in text.split(","):
        try:
            policy = Recompute.parse(word.strip())
        except ConfigError:
            policy = None
        if policy is None:
            raise ConfigError(f"--hbp-profile-recompute {word!r}: none, fullN or sel=MODULE+MODULE, comma-separated")
        if policy.num_layers > num_layers:
            raise ConfigError(f"--hbp-profile-recompute {word!r}: the model has {num_layers} layers")
        if policy not in policies:
            policies.append(policy)
    return tuple(policies)


def settings(
    lengths: Sequence[int],
    cp_degrees: Sequence[int],
    policies: Sequence[Recompute],
    *,
    unit: int,
    most_local: int | None = None,
) -> tuple[Setting, ...]:
    """Every setting that can be run, by memory: local tokens first, then what recomputes most.

    Each (length, degree, policy) is run with one sample as long as the pack. Packs of many samples, which tell the cost
    of tokens from that of squares, are run with the policy that recomputes least, and with the one that recomputes
    most: the attention that other policies run again is in between. `unit`: local tokens come in multiples;
    `most_local`: settings with more tokens on a rank are left out.

    Raises:
        ConfigError: nothing is left.
    """
    shaped = {min(policies, key=_recomputed), max(policies, key=_recomputed)}
    most = most_local or max(lengths)
    found = [
        Setting(tokens=tokens, cp_degree=c, recompute=str(policy), shape=shape)
        for tokens in lengths
        for c in cp_degrees
        # twice the unit: mirrored slices
        if tokens % (2 * c * unit if c > 1 else unit) == 0 and LEAST_LOCAL_TOKENS <= tokens // c <= most
        for policy in policies
        for shape in SHAPES
        if shape == "one" or policy in shaped
    ]
    if not found:
        raise ConfigError(
            f"no --hbp-profile-lengths {','.join(map(str, lengths))} divides by a CP degree of "
            f"{','.join(map(str, cp_degrees))} into at least {LEAST_LOCAL_TOKENS} tokens on a rank, in multiples of "
            f"{2 * unit}{f', at most {most_local}' if most_local else ''}: give other lengths, best powers of two"
        )
    return tuple(sorted(found, key=_memory_order))


def _memory_order(s: Setting) -> tuple[Any, ...]:
    """What needs least first; of one setting the single sample before many."""
    return s.local_tokens, s.tokens, -_recomputed(s.policy), s.recompute, -s.squares


def _recomputed(policy: Recompute) -> float:
    """An order, not a measure: none, modules, layers."""
    return policy.num_layers + 1 if policy.granularity == "full" else len(policy.modules) / 100
