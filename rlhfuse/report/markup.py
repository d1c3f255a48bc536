"""HTML in pieces: whatever comes from outside is escaped here, and nowhere inserted raw."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

import msgspec

from rlhfuse.report.lanes import LaneData

HINT = "Click, then scroll to zoom; drag to pan; double-click for all; keys: arrows, + and -"


def section(title: str, why: str, *parts: str) -> str:
    """A card with a heading; empty when it has nothing to show."""
    content = "".join(parts)
    if not content:
        return ""
    told = f'<p class="why">{escape(why)}</p>' if why else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def tile(name: str, value: str | None, more: str) -> str:
    """A headline number; None says that it is not known."""
    shown = f"<b>{escape(value)}</b>" if value is not None else '<b class="unknown">not known</b>'
    return (
        f'<div class="tile"><span class="name">{escape(name)}</span>{shown}'
        f'<span class="more">{escape(more)}</span></div>'
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int, sum_row: bool = False
) -> str:
    """Columns from `numeric_from` on are right-aligned; the last row may be a sum."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{escape(text)}</{tag}>'
            if i >= numeric_from
            else f"<{tag}>{escape(text)}</{tag}>"
            for i, text in enumerate(texts)
        )

    body = "".join(
        f'<tr class="sum">{cells("td", row)}</tr>'
        if sum_row and i == len(rows) - 1
        else f"<tr>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    )
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def timeline_view(source_id: str, data: LaneData, wall_s: float | None = None) -> str:
    """The place where ``timeline.js`` draws `data`; `wall_s` gives two views one scale."""
    wall = f' data-wall="{wall_s!r}"' if wall_s is not None else ""
    return (
        f'<div class="timeline" data-source="{escape(source_id)}"{wall}>'
        f'<div class="tools"><h3>{escape(data.title)}</h3><span>{HINT}</span>'
        '<button type="button" data-act="in" aria-label="zoom in">+</button>'
        '<button type="button" data-act="out" aria-label="zoom out">&minus;</button>'
        '<button type="button" data-act="all">all</button></div>'
        '<div class="stage" tabindex="0" role="img" '
        f'aria-label="{escape(data.title)}"><canvas></canvas>'
        '<div class="tip" hidden><div></div><div></div></div></div>'
        '<div class="legend"></div></div>'
    )


def page(
    *,
    title: str,
    kicker: str,
    lead: str,
    body: str,
    data: Mapping[str, LaneData],
) -> str:
    """The whole page. `body` is markup made by this module's functions; the rest is text."""
    files = resources.files("rlhfuse.report")
    script = files.joinpath("timeline.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "title": escape(title),
        "kicker": escape(kicker),
        "lead": escape(lead),
        "script_hash": f"sha256-{digest}",
        "style": files.joinpath("style.css").read_text(),
        "script": script,
        "data": "".join(_data_block(name, value) for name, value in data.items()),
        "body": body,
    }
    # Cut once at the marks, so that a value that holds a mark stays as it is.
    first, *rest = files.joinpath("template.html").read_text().split("@@")
    names, texts = rest[::2], rest[1::2]
    return first + "".join(values[n] + t for n, t in zip(names, texts, strict=True))


def _data_block(name: str, data: LaneData) -> str:
    text = msgspec.json.encode(data).decode()
    # Inside a script element only "<" could end it or open a comment.
    safe = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{safe}</script>'
