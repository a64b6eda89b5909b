"""Values of JSON files, checked before anything is computed with them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def check_numbers(
    values: Mapping[str, Any], names: Iterable[str], *, least: float = 0.0, whole: bool = False, none: bool = False
) -> None:
    """Raise ValueError naming the first of `names` that is no finite number of at least `least`.

    `whole` wants whole numbers; `none` lets null pass.
    """
    for name in names:
        value = values[name]
        if none and value is None:
            continue
        if not is_number(value, least=least, whole=whole):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name} is {value!r}, not {kind} of at least {least:g}")


def is_number(value: Any, *, least: float = 0.0, whole: bool = False) -> bool:
    """Whether `value` is a finite number of at least `least`; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return least <= value < math.inf


def check_attention(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are the fields of an AttentionShape."""
    widths = {"num_query_heads", "num_kv_heads", "qk_width", "v_width"}
    check_numbers(values, sorted(widths), least=1, whole=True)
    check_numbers(values, sorted(values.keys() - widths), whole=True)
