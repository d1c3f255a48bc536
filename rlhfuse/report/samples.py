"""Samples before and after, side by side."""

from collections.abc import Sequence
from html import escape

from rlhfuse.report.markup import section
from rlhfuse.report.numbers import sample_pairs
from rlhfuse.report.sources import SampleRow

_SHOWN = 4
_MOST = 40


def samples_section(samples: Sequence[SampleRow]) -> str:
    """The first prompts that were answered at the first and at the last validation."""
    pairs = sample_pairs(samples)
    if not pairs:
        return ""
    first, rest = pairs[:_SHOWN], pairs[_SHOWN:_MOST]
    more = (
        f"<details><summary>{len(rest)} more</summary>{''.join(map(_pair, rest))}</details>"
        if rest
        else ""
    )
    before, after = pairs[0]
    return section(
        "Samples, before and after",
        f"Responses to the same held-out prompts at step {before.step} and at step {after.step}: "
        f"the first of {len(pairs)} in file order, not picked.",
        *map(_pair, first),
        more,
    )


def _pair(pair: tuple[SampleRow, SampleRow]) -> str:
    before, after = pair
    better = before.score is not None and after.score is not None and after.score > before.score
    name = f"{escape(before.set)}: " if before.set else ""
    answers = _answer("before", before, False) + _answer("after", after, better)
    return (
        f'<div class="pair"><p class="text prompt">{name}{escape(before.prompt)}</p>'
        f'<div class="two">{answers}</div></div>'
    )


def _answer(title: str, sample: SampleRow, better: bool) -> str:
    up = " up" if better else ""
    score = f'<span class="score{up}">{sample.score:.3f}</span>' if sample.score is not None else ""
    text = escape(sample.response) or '<span class="quiet">(empty)</span>'
    return f'<div><h3>{score}{title}</h3><p class="text answer">{text}</p></div>'
