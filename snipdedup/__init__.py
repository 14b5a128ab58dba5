"""snipdedup: find near-duplicate image features, verify each one, write the cleaned metadata.

>>> import snipdedup
>>> result = snipdedup.dedup(features, threshold=0.95)  # array or path  # doctest: +SKIP
>>> features[~result.is_dup]  # doctest: +SKIP

Each function does what a command of ``snip`` does; ``help(snipdedup.dedup)`` lists its settings.
"""

from __future__ import annotations

from typing import Any

from snipdedup.errors import SnipError, UsageError

__version__ = "0.1.0"
__all__ = [
    "Result", "SnipError", "UsageError", "__version__", "apply", "audit", "build_index",
    "compress", "dedup", "diff", "download", "embed", "evaluate", "filter", "open_result", "plan",
    "push", "report", "search", "suggest_threshold", "top", "train", "why",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Late, so that `import snipdedup` and `snip --help` load neither torch nor faiss.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from snipdedup.commands import LATE, library_function, load
    from snipdedup.config import BY_FUNCTION

    found = load(LATE[name]) if name in LATE else library_function(BY_FUNCTION[name])
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
