"""What is read of the metadata once the search is done, tried before it begins."""

from __future__ import annotations

from snipdedup.config import EXPORTS, Dedup, named_kinds
from snipdedup.deduplication.outputs import texts
from snipdedup.groups.keep import ColumnRank, rank_by
from snipdedup.groups.url_baseline import baseline_uses
from snipdedup.metadata.additions import caption_uses
from snipdedup.metadata.export import list_columns, list_uses
from snipdedup.metadata.kept_rows import try_writing
from snipdedup.metadata.precheck import ColumnUse, try_column_uses
from snipdedup.metadata.tables import Metadata


def rehearse_order(options: Dedup, metadata: Metadata | None) -> None:
    """Refuse metadata by whose columns rows cannot be ordered as ``--keep`` asks."""
    if metadata is not None:
        try_column_uses(metadata, order_uses(options, metadata))


def rehearse_end(options: Dedup, metadata: Metadata | None, key: str | None) -> None:
    """Refuse metadata of which the end could not make what the settings ask for.

    Parameters
    ----------
    options : Dedup
    metadata : Metadata or None
    key : str or None
        The column of keys.
    """
    if metadata is None:
        return
    kinds = named_kinds("export", options.export, EXPORTS)
    lists = list_columns(kinds, metadata, options.key)
    named = "name a column of texts or numbers with --key"
    try_column_uses(
        metadata,
        [
            *order_uses(options, metadata),
            *([ColumnUse([key], texts, named)] if key else []),
            *baseline_uses(metadata),
            *caption_uses(options, metadata),
            *list_uses(lists, metadata),
            ColumnUse(None, try_writing, "leave it out of META", by_schema=True),
        ],
    )


def order_uses(options: Dedup, metadata: Metadata) -> list[ColumnUse]:
    """Return what ``--keep`` reads."""
    rank = None if options.method == "semdedup" else rank_by(str(options.keep), 0, metadata)
    return [rank.use()] if isinstance(rank, ColumnRank) else []
