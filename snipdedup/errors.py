"""How snip refuses: what it found is wrong, or how it was called is."""


class SnipError(Exception):
    """Bad input or a failed run: says what was expected, what was found, and what to do."""


class InputError(SnipError):
    """Rows that cannot be used, found while reading; there is nothing to resume."""


class MissingError(SnipError):
    """A remote file, or another file that was asked for by name, is not there."""


class TemporaryError(SnipError):
    """A fault of a connection or server that may pass; ``wait``: the seconds that it asks for."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait


class RangeError(SnipError):
    """A server has no such range of bytes, or sent bytes of another version of the file."""


class WriteError(SnipError):
    """A file that cannot be written; what is complete stays, to go on from when it can."""


class DamagedError(SnipError):
    """What a stopped run left is damaged so that it cannot go on; it begins anew."""


class InternalError(SnipError):
    """A result that contradicts the input, by a fault of this package; nothing is written."""


class UsageError(SnipError):
    """A call that cannot be understood; raised before any work starts (exit status 2)."""


class InputTypeError(UsageError, TypeError):
    """What was given as features is of a type that cannot be read."""
