"""The mistakes a user can make, as types. Each message names the key, the value and the fix."""

from collections.abc import Iterator
from contextlib import contextmanager

_KEPT = "\u00a0\u3000\u200c\u200d"
"""Not printable as Python sees it, but harmless: wide spaces, and what joins and parts letters and emoji."""


class UserError(Exception):
    """A mistake in what the user handed in. Entry points print it as one line and exit with 2."""

    def __str__(self) -> str:
        return visible(super().__str__())


class ConfigError(UserError):
    """A recipe or command-line value that cannot work.

    Args:
        key: dotted name of the setting, as the user writes it (``parallel.expert``).
        value: what was given.
        fix: what to write instead, as a short sentence.
    """

    def __init__(self, key: str, value: object, fix: str):
        super().__init__(f"{key}={value!r}: {fix}")
        self.key, self.value, self.fix = key, value, fix

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """So that it can be pickled: a loader's process sends it to its rank."""
        return type(self), (self.key, self.value, self.fix)


class DataError(UserError):
    """A latent folder, shard or image source that is missing, damaged or unsafe."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or does not fit the model."""


@contextmanager
def loading(problem: str) -> Iterator[None]:
    """Whatever fails in this context is a ``DataError``: the problem, and the library's reason. Hubs, configs and weights each fail in
    their own ways."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{problem} ({in_a_line(error)})") from error


def in_a_line(error: object, most: int = 200) -> str:
    """A library's error message as one line of at most ``most`` characters, to quote in a message of ours."""
    return visible(" ".join(str(error).split()))[:most]


def visible(text: object) -> str:
    """``text`` with escapes for what a terminal would not print but obey, such as line ends and marks that turn the direction of
    writing: names and captions in data may come from anyone."""
    return "".join(c if c.isprintable() or c in _KEPT else ascii(c)[1:-1] for c in str(text))


def some(names: list[str]) -> str:
    """The first 20 of ``names``, to list in a message."""
    return visible(", ".join(names[:20]) + (", ..." if len(names) > 20 else ""))
