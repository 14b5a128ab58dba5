"""snipdedup: find near-duplicate image features, prove each one, write the cleaned metadata.

>>> import snipdedup
>>> result = snipdedup.dedup(features, threshold=0.95)  # array or path  # doctest: +SKIP
>>> features[~result.is_dup]  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snipdedup.errors import SnipError

if TYPE_CHECKING:
    from snipdedup.deduplication.result import Result
    from snipdedup.deduplication.run import dedup

__version__ = "0.1.0"
__all__ = ["Result", "SnipError", "__version__", "dedup"]


def __getattr__(name: str) -> Any:
    # Late, so that `import snipdedup` and `snip --help` load neither torch nor faiss.
    if name == "dedup":
        from snipdedup.deduplication.run import dedup

        return dedup
    if name == "Result":
        from snipdedup.deduplication.result import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
