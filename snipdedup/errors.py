"""The two ways in which snip refuses: what it found is wrong, or how it was called is."""


class SnipError(Exception):
    """Bad input or a failed run: says what was expected, what was found, and what to do."""


class UsageError(SnipError):
    """A call that cannot be understood; raised before any work starts (exit status 2)."""
