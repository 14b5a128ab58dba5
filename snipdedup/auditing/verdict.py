"""What an audit found, in the few lines that it ends with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHOWN = 5  # violations of one kind in words


@dataclass
class Kind:
    """Violations of one kind: how many, and the first ones in words."""

    count: int = 0
    shown: list[str] = field(default_factory=list)


class Verdict:
    """Collects what was checked and what is wrong."""

    def __init__(self) -> None:
        self.checked: dict[str, list[str]] = {}
        self.kinds: dict[str, Kind] = {}

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.kinds

    def say(self, what: str, text: str) -> None:
        """Note what was checked, or what is so by design."""
        self.checked.setdefault(what, []).append(text)

    def fail(self, kind: str, message: str) -> None:
        """Note one violation."""
        self.fail_each(kind, [message], str)

    def fail_each(self, kind: str, found: Any, describe: Callable[[Any], str]) -> None:
        """Note many violations; ``describe`` puts the first ones into words."""
        if not len(found):
            return
        entry = self.kinds.setdefault(kind, Kind())
        entry.count += len(found)
        entry.shown += [describe(one) for one in found[: SHOWN - len(entry.shown)]]

    def text(self, of: str) -> str:
        """Return the verdict, what is wrong first."""
        total = sum(kind.count for kind in self.kinds.values())
        outcome = f"FAILED, {total:,} violation{'s' * (total != 1)}" if total else "passed"
        lines = [f"audit of {of}: {outcome}"]
        for kind in self.kinds.values():
            lines += [f"  ! {message}" for message in kind.shown]
            if kind.count > len(kind.shown):
                lines.append(f"  ! and {kind.count - len(kind.shown):,} more like that")
        for what, texts in self.checked.items():
            heads = [what, *[""] * (len(texts) - 1)]
            lines += [f"  {head:<9} {text}" for head, text in zip(heads, texts, strict=True)]
        return "\n".join(lines)


def pick_ordinals(total: int, wanted: int, seed: int) -> np.ndarray:
    """Return ``wanted`` (or all, if fewer) of the numbers below ``total`` at random, ascending."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(total, min(total, wanted), replace=False, shuffle=False))
