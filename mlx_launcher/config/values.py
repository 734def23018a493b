"""Durations and sizes as a configuration may write them, in seconds and bytes."""

import re

_NUMBER = r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_FOLDED_BYTES = {name.lower(): factor for name, factor in _BYTES.items()}
# Beyond these a deadline or a limit is a slip of the finger, and some of the kernel's calls refuse it.
MAX_SECONDS = 3650 * 86400.0
MAX_BYTES = 2**60

DURATION_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*(ms|s|m|min|h|d)\s*$"
SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT][iI]?)?[bB]\s*$"


def seconds(value: object) -> float:
    """A duration in seconds: a number is milliseconds, as anyclaude's are; a text is "30s", "500ms", "5m", "2h", "1d".

    ValueError says what is wanted instead.
    """
    wanted = 'a duration is wanted: milliseconds, or a text like "30s" or "5m"'
    if isinstance(value, str):
        found = re.fullmatch(_NUMBER, value)
        factor = _SECONDS.get(found[2]) if found else None
        if found is None or factor is None:
            raise ValueError(wanted)
        result = float(found[1]) * factor
    elif isinstance(value, int | float) and not isinstance(value, bool):
        result = min(value, 1e300) / 1000
    else:
        raise ValueError(wanted)
    if not 0 <= result <= MAX_SECONDS:
        raise ValueError("a duration from 0 to ten years is wanted")
    return result


def size(value: object) -> int:
    """A size in bytes: a whole number, or a text like "40GB" (thousands) or "40GiB" (1024s). ValueError as `seconds`."""
    wanted = 'a size is wanted: bytes, or a text like "40GB"'
    if isinstance(value, str):
        found = re.fullmatch(_NUMBER, value)
        factor = _FOLDED_BYTES.get(found[2].lower()) if found else None
        if found is None or factor is None:
            raise ValueError(wanted)
        result = int(float(found[1]) * factor)
    elif isinstance(value, int) and not isinstance(value, bool):
        result = value
    else:
        raise ValueError(wanted)
    if not 0 <= result <= MAX_BYTES:
        raise ValueError("a size from 0 to 1 EiB is wanted")
    return result


def typed_size(text: str) -> int:
    """A size as a command's option has it, where bytes are a text too. ValueError as `size`."""
    return size(int(text) if text.isdecimal() and len(text) < 20 else text)


def duration_text(value: float) -> str:
    """A duration as the configuration may hold it: "30s", "500ms"."""
    return f"{value:g}s" if value >= 1 or value == 0 else f"{value * 1000:g}ms"
