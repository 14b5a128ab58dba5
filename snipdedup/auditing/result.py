"""What an audit found: what was checked, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 5  # violations of one kind in words


@dataclass
class Violations:
    """Violations of one kind: how many, and the first ones in words."""

    count: int = 0
    shown: list[str] = field(default_factory=list)


@dataclass
class AuditResult:
    """The result of ``snip audit``; ``str()`` is what the command prints.

    Attributes
    ----------
    folder : Path
        The finished run that was audited.
    checked : dict of str to list of str
        By subject: what was compared, in words.
    violations : dict of str to Violations
        By kind: what is wrong.
    precision : str
        With ``judged``: the precision that a person found. Then nothing else is checked.
    """

    folder: Path
    checked: dict[str, list[str]] = field(default_factory=dict)
    violations: dict[str, Violations] = field(default_factory=dict)
    precision: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.violations

    def note(self, subject: str, text: str) -> None:
        """Add a line about what was checked."""
        self.checked.setdefault(subject, []).append(text)

    def fail(self, kind: str, message: str) -> None:
        """Add one violation."""
        self.fail_each(kind, [message], str)

    def fail_each(self, kind: str, found: Any, describe: Callable[[Any], str]) -> None:
        """Add many violations; ``describe`` puts the first ones into words."""
        if len(found):
            entry = self.violations.setdefault(kind, Violations())
            entry.count += len(found)
            entry.shown += [describe(one) for one in found[: SHOWN - len(entry.shown)]]

    def __str__(self) -> str:
        if self.precision:
            return self.precision
        total = sum(kind.count for kind in self.violations.values())
        outcome = f"FAILED, {total:,} violation{'s' * (total != 1)}" if total else "passed"
        lines = [f"audit of {self.folder}: {outcome}"]
        for kind in self.violations.values():
            lines += [f"  ! {message}" for message in kind.shown]
            if kind.count > len(kind.shown):
                lines.append(f"  ! and {kind.count - len(kind.shown):,} more like that")
        for subject, texts in self.checked.items():
            heads = [subject, *[""] * (len(texts) - 1)]
            lines += [f"  {head:<9} {text}" for head, text in zip(heads, texts, strict=True)]
        return "\n".join(lines)
