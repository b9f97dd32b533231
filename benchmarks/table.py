"""A benchmark's tables, as Markdown and as a page that opens offline."""

import re
from collections.abc import Sequence
from html import escape


class Table:
    """A heading, a note, and cells, the first row their names; `figures` holds plots as HTML."""

    def __init__(
        self, title: str, note: str, cells: Sequence[Sequence[str]], figures: Sequence[str] = ()
    ) -> None:
        if len({len(row) for row in cells}) > 1:
            raise ValueError(f"{title}: a row has more or fewer cells than there are names")
        self.title, self.note, self.cells, self.figures = title, note, cells, figures

    def markdown(self) -> str:
        """Return it in Markdown."""
        lines = [self.cells[0], ["---"] * len(self.cells[0]), *self.cells[1:]]
        return f"## {self.title}\n\n{self.note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """Return it in HTML, for the style sheets of both `loadtest` and `compress`."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.cells[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in self.cells[1:]
        )
        figures = "".join(f"<figure>{figure}</figure>" for figure in self.figures)
        return (
            f'<h2>{escape(self.title)}</h2><p class="note">{_prose(self.note)}</p>'
            f'<div class="wide scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
            + (f'<div class="plots grid2">{figures}</div>' if figures else "")
        )


def page(title: str, intro: str, tables: Sequence[Table], style: str) -> str:
    """Return the whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main><h1>{escape(title)}</h1><p>{_prose(intro)}</p>\n"
        + "\n".join(table.html() for table in tables)
        + "</main></body></html>\n"
    )


def _prose(text: str) -> str:
    """Return text with Markdown's code spans as HTML's."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _cell(text: str) -> str:
    """Return a cell's content; its interval goes below the value, so that a wide table fits."""
    value, bracket, interval = text.partition(" [")
    return escape(value) + (f" <small>[{escape(interval)}</small>" if bracket else "")
