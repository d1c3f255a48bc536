"""Conditions over a summary, such as ``bubble_fraction>0.2`` or ``causes.long_tail >= 3``. Pure."""

import operator
import re
from collections.abc import Callable, Mapping

from rlhfuse.profiler.summary import ProfileSummary

_FORM = re.compile(r"\s*([A-Za-z_.]+)\s*(<=|>=|<|>|==|!=)\s*([-+0-9.eE]+)\s*")
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def holds(expression: str, summary: ProfileSummary) -> bool:
    """Whether a condition holds.

    Args:
        expression: a name, a comparison, a number. Names: ``bubble_fraction``, ``wall_s``,
            ``num_ranks``, ``idle_fraction`` and ``causes.<cause>`` (seconds).

    Raises:
        ValueError: it is not of this form, or its value is not known for this trace.
    """
    match = _FORM.fullmatch(expression)
    if match is None:
        raise ValueError(
            f"--fail-if {expression!r}: expected NAME, a comparison and a number, "
            "for example bubble_fraction>0.2"
        )
    name, comparison, number = match.groups()
    try:
        limit = float(number)
    except ValueError:
        raise ValueError(f"--fail-if {expression!r}: {number!r} is not a number") from None
    values = _values(summary)
    if name not in values and not name.startswith("causes."):
        raise ValueError(
            f"--fail-if {expression!r}: unknown name {name!r} (known: {_list(values)})"
        )
    value = values.get(name, 0.0)  # a cause that took no time
    if value is None:
        raise ValueError(f"--fail-if {expression!r}: {name} is not known for this trace")
    return _COMPARE[comparison](value, limit)


def _values(summary: ProfileSummary) -> dict[str, float | None]:
    walls = sum(rank.wall_s for rank in summary.per_rank)
    idle = sum(rank.idle_s for rank in summary.per_rank)
    values: dict[str, float | None] = {
        "bubble_fraction": summary.bubble_fraction,
        "idle_fraction": idle / walls if walls > 0 else None,
        "wall_s": summary.wall_s,
        "num_ranks": float(summary.num_ranks),
    }
    return values | {f"causes.{name}": seconds for name, seconds in summary.causes.items()}


def _list(values: Mapping[str, float | None]) -> str:
    return ", ".join(name for name in values if not name.startswith("causes.")) + ", causes.<cause>"
