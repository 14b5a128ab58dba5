"""What a result is in Python besides its numbers: tables of its rows, a notebook's view, a picture.

The tables are in memory, joined with the columns of the input's metadata.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.commands import load
from snipdedup.deduplication.inputs import open_metadata_of
from snipdedup.errors import SnipError

STEPS = 64  # points of the curve
WIDTH, HEIGHT, MARGIN = 360, 130, 20  # of the curve, pixels
ELSEWHERE = ("shard", "shard_row", "key", "is_dup")  # columns of groups.parquet that say no more


class Shown:
    """The base of `Result`: how it shows itself, and its rows as tables."""

    def __repr__(self: Any) -> str:
        share = f"{100 * self.duplicate_ratio:.2f} %"
        return (
            f"<Result: {self.rows:,} rows, {self.removed:,} removed ({share}), {self.kept:,} kept; "
            f"threshold {self.threshold:.9g}, {self.how}>"
        )

    def _repr_html_(self: Any) -> str:
        entries = self.entries() if self.manifest is None else self.manifest
        counts = {name.replace("_", " "): f"{n:,}" for name, n in entries["counts"].items()}
        levels = entries["thresholds"]
        heads = [name.replace("_", " ") for name in levels[0]] if levels else []
        body = [[shown(value) for value in level.values()] for level in levels]
        parts = [f"<p>{escape(repr(self)[1:-1])}</p>", html_table(list(counts), [counts.values()])]
        if levels:
            parts += ["<p>At other thresholds</p>", html_table(heads, body)]
            parts.append(curve_svg(*self.curve()))
        if self.out is not None:
            parts.append(f"<p>written to {escape(str(self.out))}</p>")
        return f"<div>{''.join(parts)}</div>"

    @property
    def how(self: Any) -> str:
        """The rule that decided: the grouping, or SemDeDup's."""
        return "SemDeDup's rule" if self.search.best is not None else f"grouping {self.grouping}"

    @property
    def selected(self: Any) -> Any:
        """The rows to keep, ascending, as a ``pyarrow.Table``: row int64, the input's columns."""
        return self.joined(pa.table({"row": np.flatnonzero(~self.is_dup)}))

    @property
    def duplicates(self: Any) -> Any:
        """The rows to remove, ascending, as a ``pyarrow.Table``.

        Columns: row, group, representative int64, similarity float32 (the cosine of the two), those
        of references and of second features where there are any, and the input's columns.
        """
        groups = self.groups
        table = groups.select([name for name in groups.column_names if name not in ELSEWHERE])
        removed = np.flatnonzero(groups["is_dup"].to_numpy())
        order = removed[np.argsort(groups["row"].to_numpy()[removed])]
        return self.joined(table.take(pa.array(order)))

    def joined(self: Any, table: Any) -> Any:
        """Add the columns of the metadata to a table with ascending rows of the input.

        A column whose name is taken becomes ``input_NAME``.
        """
        if self.options is None:
            return table
        features = self.search.inputs.features
        given = (self.options.metadata, self.options.features, features, self.options.index)
        metadata = open_metadata_of(*given) if features is not None or given[3] else None
        if metadata is None:
            return table
        picked = metadata.pick(metadata.columns, table["row"].to_numpy())
        parts = [pa.Table.from_batches([batch]) for _, _, batch in picked]
        found = pa.concat_tables(
            [metadata.schema.empty_table(), *parts], promote_options="permissive"
        )
        for name in metadata.columns:
            own = f"input_{name}" if name in table.column_names else name
            table = table.append_column(own, found[name])
        return table

    def curve(self: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return thresholds, (n,) float64, and what grouping components removes at each, (n,).

        At any threshold the edges of the forest span the groups: each of them is a removed row.
        """
        search = self.search
        if not search.verified or search.best is not None or search.references_only:
            raise SnipError("a curve needs verified pairs of one set: there is none of this result")
        known = np.sort(search.whole_forest.similarity)
        thresholds = np.linspace(min(search.threshold, 1), 1, STEPS)
        return thresholds, len(known) - np.searchsorted(known, thresholds.astype(np.float32))

    def plot(self: Any, ax: Any = None) -> Any:
        """Draw the curve with matplotlib (extra ``plot``); return the axes."""
        thresholds, removed = self.curve()
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise SnipError(
                    "a plot needs matplotlib: pip install 'snipdedup-toolkit[plot]'"
                ) from error
            ax = pyplot.subplots()[1]
        ax.plot(thresholds, 100 * removed / self.rows, label="grouping components")
        ax.plot(
            [self.threshold], [100 * self.duplicate_ratio], "o", label=f"this result, {self.how}"
        )
        ax.set(xlabel="threshold (cosine)", ylabel="removed rows (%)", ylim=(0, None))
        ax.legend()
        return ax

    def save(self, out: str | Path, *, overwrite: bool = False) -> Any:
        """Write the files that ``snip dedup`` writes to a folder; return the result with them."""
        # by name: that module imports this one
        return load("snipdedup.deduplication.run:save_result")(self, out, overwrite=overwrite)


def shown(value: Any) -> str:
    """Return a number of the threshold table as a text; of an estimate, whether it is one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def html_table(heads: list[str], rows: Any) -> str:
    """Return a table; what it shows holds no HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(t)}</td>' for t in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def curve_svg(thresholds: np.ndarray, removed: np.ndarray) -> str:
    """Return the curve as a small picture, in the colours of the page that shows it."""
    low, most = float(thresholds[0]), max(1, int(removed[0]))
    x = MARGIN + (thresholds - low) / max(1 - low, 1e-9) * (WIDTH - 2 * MARGIN)
    y = HEIGHT - MARGIN - removed / most * (HEIGHT - 2 * MARGIN)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    texts = [
        (MARGIN, HEIGHT - 5, "start", f"{low:.3g}"),
        (WIDTH - MARGIN, HEIGHT - 5, "end", "1"),
        (MARGIN, MARGIN - 6, "start", f"{int(removed[0]):,} removed by grouping components"),
        (WIDTH / 2, HEIGHT - 5, "middle", "threshold"),
    ]
    labels = "".join(
        f'<text x="{a}" y="{b}" text-anchor="{anchor}">{text}</text>'
        for a, b, anchor, text in texts
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        'aria-label="removed rows by threshold" fill="currentColor" font-size="11">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/>{labels}</svg>'
    )
