"""A report as sections of text, tables and pictures; as Markdown, and as one HTML page that needs no other file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Table:
    """headers, and rows of as many cells; `figures`: the columns that hold figures and are set flush right."""

    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    figures: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A heading of `level`, paragraphs, tables, and pictures by their files."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Path] = ()
    level: int = 2


def to_markdown(sections: Sequence[Section]) -> str:
    """The pictures are linked by their names, from the same folder."""
    blocks = []
    for section in sections:
        blocks.append(f"{'#' * section.level} {section.title}")
        blocks += section.paragraphs
        blocks += [table_to_markdown(table) for table in section.tables]
        blocks += [f"![{section.title}]({picture.name})" for picture in section.pictures]
    return "\n\n".join(blocks) + "\n"


def table_to_markdown(table: Table) -> str:
    """A GitHub table."""
    rules = ["---:" if column in table.figures else "---" for column in range(len(table.headers))]
    rows = [table.headers, tuple(rules), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page, the pictures within it."""
    body = "\n".join(_section_to_html(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _section_to_html(section: Section) -> str:
    parts = [f"<h{section.level}>{html.escape(section.title)}</h{section.level}>"]
    parts += [f"<p>{_inline(paragraph)}</p>" for paragraph in section.paragraphs]
    parts += [_table_to_html(table) for table in section.tables]
    for picture in section.pictures:
        content = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{content}">')
    return "\n".join(parts)


def _table_to_html(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in table.headers)
    rows = []
    for row in table.rows:
        cells = [
            f'<td class="figure">{_inline(cell)}</td>'
            if column in table.figures
            else f"<td>{_inline(cell)}</td>"
            for column, cell in enumerate(row)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table>"


def _inline(text: str) -> str:
    """Escaped, with `code` between backquotes set as such."""
    pieces = html.escape(text).split("`")
    if len(pieces) % 2 == 0:  # a lone backquote is one
        return html.escape(text)
    return "".join(f"<code>{piece}</code>" if odd % 2 else piece for odd, piece in enumerate(pieces))
