"""What is read of the metadata once the search is done, tried before it begins."""

from __future__ import annotations

from snipdedup.config import EXPORTS, Dedup, named_kinds
from snipdedup.deduplication.outputs import texts
from snipdedup.groups import url_baseline
from snipdedup.groups.keep import ColumnRank, rank_by
from snipdedup.metadata import additions, export
from snipdedup.metadata.precheck import Use, rehearse
from snipdedup.metadata.tables import Metadata, try_writing


def rehearse_order(options: Dedup, metadata: Metadata | None) -> None:
    """Refuse metadata by whose columns rows cannot be ordered as ``--keep`` asks."""
    if metadata is not None:
        rehearse(metadata, order_uses(options, metadata))


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
    lists = export.list_columns(kinds, metadata, options.key)
    named = "name a column of texts or numbers with --key"
    rehearse(
        metadata,
        [
            *order_uses(options, metadata),
            *([Use([key], texts, named)] if key else []),
            *url_baseline.uses(metadata),
            *additions.uses(options, metadata),
            *export.uses(lists, metadata),
            Use(None, try_writing, "leave it out of META", by_schema=True),
        ],
    )


def order_uses(options: Dedup, metadata: Metadata) -> list[Use]:
    """Return what ``--keep`` reads."""
    rank = None if options.method == "semdedup" else rank_by(str(options.keep), 0, metadata)
    return [rank.use()] if isinstance(rank, ColumnRank) else []
