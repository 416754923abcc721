"""What can go wrong for a user, as one tree.

XattnError                 what a user can mend: the command line prints one line, exits `exit_code`
|-- ConfigError            params.yaml or an argument: dotted key, what was found and expected
|   `-- UnknownNameError   a name that is not in a list: the nearest names
|-- DataError              raw data or shards: the file, or the shard and key
|   `-- DamageError        bytes are not what the index says they are (exit code 3)
|-- CheckpointError        weights or training state that do not fit
|-- CapacityError          more devices, cores or disk asked for than there are
`-- MissingPackageError    an optional part of the stack is not installed

Programming errors stay `AssertionError` or `TypeError`: they deserve their traceback.
"""

import difflib
from collections.abc import Iterable


class XattnError(Exception):
    """Base of everything the user can mend; the message is one line with the fix."""

    exit_code = 1


class ConfigError(XattnError):
    """A setting is missing, of the wrong type or out of range; the message opens with its key."""


class UnknownNameError(ConfigError):
    """A name was not found among the known ones.

    Args:
        what: the kind of thing that was named, e.g. "model".
        name: what was asked for.
        known: every name that would have worked.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = nearest(name, known)
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {what} '{name}'; {hint}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str]]:
        # Travels from a worker to the driver as the line that it is.
        return ConfigError, (str(self),)


class DataError(XattnError):
    """Raw files or shards break their format's promise; the message names the file or the key."""


class DamageError(DataError):
    """Bytes differ from what the index recorded; the message names shard, key and offset."""

    exit_code = 3


class CheckpointError(XattnError):
    """Weights or training state do not fit the model or the run that asked for them."""


class CapacityError(XattnError):
    """More devices, cores or disk were asked for than there are; the message holds both numbers."""


class MissingPackageError(XattnError):
    """A package that this command needs is not installed; the message names it."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None when nothing is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def check_choice(key: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is one of `known`.

    Raises:
        ConfigError: it is not; the message opens with `key`.
    """
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key}: {UnknownNameError('value', value, known)}")
    return value
