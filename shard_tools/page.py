"""A self-contained HTML page in which text from anywhere does no harm.

The page loads nothing and runs nothing: its content security policy allows pictures in data URLs
and the one style sheet inside it, by hash. Every text that comes from data goes through `text` or
`link`: escaped, shortened, isolated from the writing direction around it, and with the characters
that do not show (controls, bidirectional overrides, zero-width ones) spelt out.
"""

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import NewType
from urllib.parse import urlsplit

Html = NewType("Html", str)
"""Markup that is safe to put on a page."""

MAX_TEXT = 200  # characters
MAX_NOTE = 1000
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_MAX_URL = 2000


def visible(value: str, max_chars: int = MAX_TEXT) -> str:
    """A text with ⟨U+202E⟩ for characters that do not show, its middle left out if it is long."""
    if len(value) > max_chars:
        tail = max_chars // 3
        value = f"{value[: max_chars - tail - 1]}…{value[-tail:]}"
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in _UNSEEN else char for char in value
    )


def text(value: str, max_chars: int = MAX_TEXT) -> Html:
    """A text from data, safe to show."""
    return Html(f"<bdi>{escape(visible(value, max_chars))}</bdi>")


def hint(value: str) -> Html:
    """A text from data as the value of an attribute, quotes included."""
    return Html(f'"{escape(visible(value))}"')


def link(url: str) -> Html:
    """A link if the URL is a plain http or https one, which then is shown without scheme."""
    if not is_plain_web_url(url):
        return text(url)
    inner = text(url.partition("://")[2])
    return Html(
        f'<a href="{escape(url)}" rel="noopener noreferrer nofollow" '
        f'referrerpolicy="no-referrer">{inner}</a>'
    )


def is_plain_web_url(url: str) -> bool:
    """Whether a browser goes where the text says: no user info, no character that it would drop."""
    is_readable = url.isprintable() and not set(url) & set(" \\\"'<>`")
    if not is_readable or len(url) > _MAX_URL:
        return False
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        )
    except ValueError:
        return False


def join(parts: Sequence[Html], separator: str = "\n") -> Html:
    """Markup after one another; `separator` is markup too."""
    return Html(separator.join(parts))


def card(title: str, body: Html, *, note: str = "") -> Html:
    """Something under a heading."""
    line = f'<p class="note">{text(note, MAX_NOTE)}</p>\n' if note else ""
    head = f"<h2>{escape(title)}</h2>"
    return Html(f'<section class="card">\n{head}\n{line}{body}\n</section>')


def pair(cards: Sequence[Html]) -> Html:
    """Cards beside each other where there is room."""
    return Html(f'<div class="pair">\n{join(cards)}\n</div>')


def named(name: str, body: Html) -> Html:
    """A part of the page that `navigation` leads to."""
    return Html(f'<div id="{escape(name)}">\n{body}\n</div>')


def navigation(names: Sequence[str]) -> Html:
    """Links to the named parts of the page."""
    links = (f'<a href="#{escape(name)}">{escape(name.capitalize())}</a>' for name in names)
    return Html(f"<nav>{' '.join(links)}</nav>")


def table(columns: Sequence[str], rows: Sequence[Sequence[Html]]) -> Html:
    """A table; columns whose name begins with "#" hold numbers and are set flush right."""
    kinds = [' class="number"' if name.startswith("#") else "" for name in columns]
    heads = zip(columns, kinds, strict=True)
    head = "".join(f"<th{kind}>{escape(name.lstrip('#'))}</th>" for name, kind in heads)
    body = "\n".join(
        f"<tr>{''.join(f'<td{k}>{cell}</td>' for cell, k in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return Html(
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def folded(summary: str, body: Html) -> Html:
    """Something long that opens on a click; no script is needed for that."""
    return Html(f"<details>\n<summary>{escape(summary)}</summary>\n{body}\n</details>")


def number(value: int) -> Html:
    """A count, its thousands set apart."""
    return Html(f"{value:,}")


def share_bar(part: int, whole: int) -> Html:
    """A bar as long as the part is of the whole."""
    width = 100 * part / whole if whole else 0.0
    return Html(
        '<svg class="share" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.2f}" height="6"/></svg>'
    )


def page(title: str, body: Html) -> str:
    """The whole document."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(visible(title))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1b1c1e; --soft: #63676d;
  --line: #e3e3df; --well: #efefec; --series: #2667c9; --good: #1d7f4e; --bad: #a8480b; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e8e8e6;
  --soft: #9da2a9; --line: #33363b; --well: #26292d; --series: #6ea3f5; --good: #5cc492;
  --bad: #e8955a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; line-height: 1.25; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 .75rem; font-size: 1rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: .85rem; font-weight: 500; color: var(--soft); }
a { color: var(--series); text-decoration: none; }
a:hover { text-decoration: underline; }
.note { margin: 0 0 .75rem; max-width: 48rem; color: var(--soft); overflow-wrap: anywhere; }
.card { margin: 1rem 0 0; padding: 1rem 1.25rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr));
  gap: 0 1rem; }
.pair > * { min-width: 0; }
nav { display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin-top: .5rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1px; margin: 1rem 0 0; overflow: hidden;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; }
.figures div { flex: 1 0 8.5rem; padding: .8rem 1.25rem; background: var(--card); }
.figures dt { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums;
  letter-spacing: -.01em; white-space: nowrap; }
.figures small { color: var(--soft); font-size: .85rem; letter-spacing: 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child > * { border-bottom: 0; }
th { color: var(--soft); font-size: .85rem; font-weight: 500; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 3rem; }
td:first-child:not(.number) { min-width: 6.5rem; }
.number { text-align: right; white-space: nowrap; }
.list { display: block; }
.list > * { display: block; }
.share { display: block; width: 100%; min-width: 4rem; height: 6px; margin-top: .5em;
  background: var(--well); border-radius: 3px; }
.share rect { fill: var(--series); }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--soft); font: 12px system-ui, "Segoe UI", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
.chart .bar { fill: var(--series); }
.chart g:hover .bar { opacity: .7; }
.chart .reach { fill: transparent; }
.grid { stroke: var(--line); }
.middle { stroke: var(--bad); stroke-dasharray: 5 4; }
.chart .middle-text { fill: var(--bad); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: 1rem .75rem; }
.row { display: flex; gap: .75rem; overflow-x: auto; padding: 2px 2px .5rem; }
.row figure { flex: 0 0 9rem; }
figure { margin: 0; min-width: 0; font-size: .8rem; line-height: 1.4; break-inside: avoid; }
.frame { display: flex; align-items: center; justify-content: center; aspect-ratio: 1;
  margin-bottom: .35rem; overflow: hidden; background: var(--well); border-radius: 6px; }
.frame img { display: block; max-width: 100%; max-height: 100%; width: auto; height: auto; }
.chosen .frame { outline: 2px solid var(--good); }
.broken { padding: .75rem; color: var(--bad); text-align: center; overflow-wrap: anywhere;
  overflow-y: auto; max-height: 100%; }
figcaption > * { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
figcaption .name { font-weight: 600; }
figcaption .soft, .soft { color: var(--soft); }
.good { color: var(--good); }
code, .code { font: .9em ui-monospace, "Cascadia Mono", "Liberation Mono", monospace; }
summary { cursor: pointer; color: var(--series); padding: .35rem 0; }
footer { margin-top: 1.5rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) { body { padding: 1.25rem .75rem 3rem; }
  .card { padding: .9rem .9rem 1rem; } h1 { font-size: 1.3rem; }
  .samples { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
  .figures div { flex-basis: 40%; } .row figure { flex-basis: 7.5rem; } }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc;
  --well: #f2f2f2; } body { max-width: none; padding: 0; font-size: 11px; }
  .card { border: 0; padding: 0; margin-top: 1.5rem; } h2 { break-after: avoid; }
  .row { flex-wrap: wrap; } .scroll, .row { overflow: visible; } svg, img {
  print-color-adjust: exact; } }
"""
