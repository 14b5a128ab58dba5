"""What a run reads: FEATURES, captions' features, references, and the metadata table.

Everything is opened and checked before the search. Metadata columns that the run reads only at its
end are converted once on the first rows of each file, so that it cannot fail on them hours later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from snipdedup.deduplication.references import References, open_references
from snipdedup.errors import SnipError
from snipdedup.features.shards import Features, find_shards, implied_metadata, open_features
from snipdedup.groups.star import Also
from snipdedup.metadata.tables import Metadata, find_metadata, open_metadata
from snipdedup.storage.out_folder import read_manifest
from snipdedup.storage.remote import is_remote


class Inputs(NamedTuple):
    """What is compared.

    Attributes
    ----------
    features : Features or None
        None where an index alone is given.
    text : Features, optional
        Of the captions, row for row.
    text_threshold : float
        Cosine from which two captions match.
    references : References, optional
    """

    features: Features | None
    text: Features | None = None
    text_threshold: float = 0.0
    references: References | None = None

    @property
    def also(self) -> Also | None:
        """What a pair must match in besides."""
        if self.text is None:
            return None
        return Also(self.text.gather, self.text_threshold, self.text.dim)

    def refuse_changed(self) -> None:
        """Refuse inputs that changed since they were opened."""
        references = None if self.references is None else self.references.features
        for source in (self.features, self.text, references):
            if source is not None:
                source.refuse_changed()

    def paths(self) -> list[Path]:
        """Return the files and folders that are read."""
        sources = (self.features, self.text, self.references)
        return [path for source in sources if source is not None for path in source.inputs()]


def open_inputs(
    features: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    text_features: Any = None,
    text_threshold: float = 0.0,
    reference: Any = None,
) -> Inputs:
    """Open what the settings name.

    Raises
    ------
    SnipError
        If something cannot be read, or does not go with FEATURES.
    """
    if features is None:
        return Inputs(None)
    opened = open_features(features, parts=parts, array=array, column=column)
    text = references = None
    if text_features is not None:
        text = open_features(text_features, array=array, column=column)
        if text.rows != opened.rows:
            raise SnipError(
                f"--text_features has {text.rows:,} rows, FEATURES has {opened.rows:,}; expected "
                "one caption for each image, in the same order"
            )
    if reference is not None:
        references = open_references(reference, array=array, column=column)
        references.refuse_shared(opened)  # now, not after the search
        references.before(opened)
    return Inputs(opened, text, text_threshold, references)


def open_table(
    metadata: str | None, source: Any, features: Features | None, index: str | None
) -> Metadata | None:
    """Open META, or the metadata beside ``source``; check its rows against features or index."""
    if metadata is None and isinstance(source, str | Path):
        implied = implied_metadata(source)
        metadata = None if implied is None else str(implied)
    if metadata is None:
        return None
    table = open_metadata(metadata)
    if features is not None:
        table.check_matches(features)
    else:
        shards = read_manifest(Path(str(index)).expanduser(), "index")["shards"]
        table.check_rows([(shard["name"], shard["rows"]) for shard in shards])
    return table


def named_paths(manifest: dict[str, Any]) -> Iterator[Path]:
    """Yield the folders and files that a finished run read, where they still are."""
    settings = manifest.get("settings", {})
    parts = settings.get("parts")
    for name in ("features", "text_features", "reference", "metadata"):
        named = settings.get(name) or []
        for source in named if isinstance(named, list) else [named]:
            with suppress(SnipError, OSError):
                if not isinstance(source, str) or is_remote(source):
                    continue
                if Path(source).is_dir():
                    yield Path(source)
                if name == "metadata":
                    yield from find_metadata(source)
                else:
                    yield from find_shards(source, parts if "{part" in source else None)
