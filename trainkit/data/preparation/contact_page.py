"""The HTML of the contact sheet: one file with everything inside, for wide and narrow screens, light and dark."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SMALL_SIDE = 64  # pixels up to which a picture is enlarged without blur
PNG = b"\x89PNG"  # the start of such a file; its width and height are at bytes 16 and 20
SHOWN_BARS = 24  # classes in the summary
STYLE = """
:root { color-scheme: light dark; --page: #f1f2f4; --card: #fff; --text: #1b1d21; --soft: #5c626c; --line: #c9cdd4;
  --bar: #b9cdf0; --link: #1d5bd0 }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2025; --text: #e6e8eb; --soft: #9aa1ab;
  --line: #3c424c; --bar: #2f4a7a; --link: #7fb0ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 14px/1.45 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px }
h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere }
h2 { margin: 36px 0 4px; font-size: 18px }
h3 { margin: 18px 0 8px; font-size: 14px; overflow-wrap: anywhere }
.lead { margin: 4px 0 16px; color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 16px }
a { color: var(--link) }
.card { padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px; background: var(--card) }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0; white-space: pre-line; overflow-wrap: anywhere }
.bars { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 6px 18px; margin-top: 12px;
  padding: 14px 16px }
.bars div { display: flex; justify-content: space-between; gap: 8px; padding: 1px 6px; border-radius: 3px;
  background: linear-gradient(var(--bar), var(--bar)) 0 / calc((100% - 4.5em) * var(--share)) 100% no-repeat }
.bars span { min-width: 0; overflow-wrap: anywhere }
.bars p { grid-column: 1 / -1; margin: 4px 0 0; color: var(--soft) }
.grid { display: grid; grid-template-columns: repeat(12, minmax(0, 1fr)); gap: 12px 8px }
.grid.captions { grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 16px 12px }
@media (max-width: 900px) { .grid { grid-template-columns: repeat(6, minmax(0, 1fr)) }
  .grid.captions { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
@media (max-width: 520px) { main { padding: 16px 12px 32px } .grid { grid-template-columns: repeat(4, minmax(0, 1fr)) }
  .grid.captions { grid-template-columns: repeat(2, minmax(0, 1fr)) } dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin-bottom: 8px } }
figure { margin: 0; min-width: 0 }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 3px;
  background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 0 / 16px 16px }
.small { image-rendering: pixelated }
figcaption { margin-top: 4px }
.text, .path { display: -webkit-box; -webkit-box-orient: vertical; overflow: hidden; overflow-wrap: anywhere }
.text { -webkit-line-clamp: 4; font-size: 13px; line-height: 1.3 }
.path { -webkit-line-clamp: 2; color: var(--soft); font-size: 11px; line-height: 1.3 }
.text + .path { margin-top: 2px }
.rejected { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: flex-start; margin-top: 8px }
.rejected figure { width: 112px }
.pictures { display: flex; gap: 10px }
.about { flex: 1 1 220px; min-width: 0; overflow-wrap: anywhere }
.about code { font-size: 12px }
.more { margin: 8px 0 0; color: var(--soft) }
"""


class Figure(NamedTuple):
    """A picture as PNG or JPEG bytes, the file it comes from, and its caption."""

    picture: bytes
    source: str
    caption: str = ""

    @property
    def is_small(self) -> bool:
        """Whether it is shown larger than it is. A JPEG is not."""
        if not self.picture.startswith(PNG):
            return False
        return max(int.from_bytes(self.picture[start : start + 4], "big") for start in (16, 20)) <= SMALL_SIDE


@dataclass(frozen=True)
class Grid:
    """Pictures under a title."""

    title: str
    figures: Sequence[Figure]

    def lines(self) -> list[str]:
        kind = "grid captions" if any(figure.caption for figure in self.figures) else "grid"
        return [
            f"<h3>{escaped(self.title)}</h3>", f'<div class="{kind}">', *map(_figure, self.figures), "</div>"
        ]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Files that were rejected for one reason: (pictures, file, message) each, and how many are not shown."""

    title: str
    rows: Sequence[tuple[Sequence[Figure], str, str]]
    more: str = ""

    def lines(self) -> list[str]:
        lines = [f"<h3>{escaped(self.title)}</h3>"]
        for figures, source, message in self.rows:
            pictures = f'<div class="pictures">{"".join(map(_figure, figures))}</div>' if figures else ""
            about = f'<div class="about"><code>{escaped(source)}</code><br>{escaped(message)}</div>'
            lines.append(f'<div class="rejected card">{pictures}{about}</div>')
        return lines + ([f'<p class="more">{escaped(self.more)}</p>'] if self.more else [])


class Part(NamedTuple):
    """A part of the page, with a heading and a link at the top."""

    title: str
    content: Sequence[Grid | Fault]


def contact_page(
    name: str, lead: str, facts: dict[str, str], classes: dict[str, int], parts: Sequence[Part], mark: str
) -> str:
    """The page: summary, classes and their counts, then `parts`. `mark` is put into its head."""
    body = [f"<h1>{escaped(name)}</h1>", f'<p class="lead">{escaped(lead)}</p>']
    links = [f'<a href="#part-{number}">{escaped(part.title)}</a>' for number, part in enumerate(parts)]
    body.append(f"<nav>{''.join(links)}</nav>")
    rows = [f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in facts.items()]
    body.append(f'<dl class="card">{"".join(rows)}</dl>')
    body += _bars(classes)
    for number, part in enumerate(parts):
        body.append(f'<h2 id="part-{number}">{escaped(part.title)}</h2>')
        body += [line for piece in part.content for line in piece.lines()]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">' + mark,
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(name)}</title><style>{STYLE}</style>",
    ]
    start = ["<!DOCTYPE html>", '<html lang="en"><head>', *head, "</head><body><main>"]
    return "\n".join([*start, *body, "</main></body></html>", ""])


def _bars(classes: dict[str, int]) -> list[str]:
    """The counts of the largest classes as bars, and a line about all of them."""
    if not classes:
        return []
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    most, least = ordered[0][1], ordered[-1][1]
    lines = ['<div class="bars card">']
    for name, count in ordered[:SHOWN_BARS]:
        share = f"{count / most:.3f}" if most else "0"
        lines.append(f'<div style="--share: {share}"><span>{escaped(name)}</span>{count:,}</div>')
    hidden = len(ordered) - SHOWN_BARS
    more = f"; {hidden:,} smaller ones are not listed" if hidden > 0 else ""
    images = f"{most:,} images" if most == least else f"{least:,} to {most:,} images"
    return [*lines, f"<p>{len(ordered):,} classes of {images}{' each' * (most == least)}{more}</p></div>"]


def _figure(figure: Figure) -> str:
    mime = "png" if figure.picture.startswith(PNG) else "jpeg"
    small = ' class="small"' if figure.is_small else ""
    text = f'<span class="text">{escaped(figure.caption[:200])}</span>' if figure.caption else ""
    source = escaped(figure.source[:200])
    return (
        f'<figure><img{small} src="data:image/{mime};base64,{base64.b64encode(figure.picture).decode()}" alt="">'
        f'<figcaption>{text}<span class="path" title="{source}">{source}</span></figcaption></figure>'
    )


def escaped(text: str) -> str:
    """`text` for HTML; a file may be called anything."""
    return html.escape(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
