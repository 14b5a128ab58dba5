"""What a run compares: FEATURES, the captions' features beside them, the references before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from snipdedup.config import Dedup
from snipdedup.deduplication.references import References, open_references
from snipdedup.errors import SnipError
from snipdedup.features.shards import Features, find_shards, open_features
from snipdedup.groups.star import Also
from snipdedup.metadata.tables import find_metadata
from snipdedup.storage.remote import is_remote


class Inputs(NamedTuple):
    """What is compared.

    Attributes
    ----------
    features : Features or None
        None where an index alone is given.
    text : Features, optional
        Of the captions, row for row.
    references : References, optional
    """

    features: Features | None
    text: Features | None = None
    references: References | None = None

    def also(self, options: Dedup) -> Also | None:
        """Return what a pair must match in besides."""
        if self.text is None:
            return None
        return Also(self.text.gather, options.text_threshold, self.text.dim)

    def refuse_changed(self) -> None:
        """Refuse what changed since it was opened; see `shards.refuse_changed`."""
        references = None if self.references is None else self.references.features
        for source in (self.features, self.text, references):
            if source is not None:
                source.refuse_changed()

    def paths(self) -> list[Path]:
        """Return the files and folders that are read."""
        return [path for source in self if source is not None for path in source.inputs()]


def named_paths(manifest: dict[str, Any]) -> Iterator[Path]:
    """Yield the folders and files that a finished run read, where they still are.

    Nothing is to be written there; see `out_folder.refuse_output_file`.
    """
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


def open_inputs(options: Dedup) -> Inputs:
    """Open what the settings name.

    Raises
    ------
    SnipError
        If something cannot be read, or does not go with FEATURES.
    """
    if options.features is None:
        return Inputs(None)
    array, column = options.array, options.column
    features = open_features(options.features, parts=options.parts, array=array, column=column)
    text = references = None
    if options.text_features is not None:
        text = open_features(options.text_features, array=array, column=column)
        check_captions(features, text)
    if options.reference is not None:
        references = open_references(options.reference, array=array, column=column)
        references.refuse_shared(features)  # now, not after the search
        references.before(features)
    return Inputs(features, text, references)


def check_captions(features: Features, text: Features) -> None:
    """Refuse features of captions that do not match those of images row for row."""
    if text.rows != features.rows:
        raise SnipError(
            f"--text_features has {text.rows:,} rows, FEATURES has {features.rows:,}; expected one "
            "caption for each image, in the same order"
        )
