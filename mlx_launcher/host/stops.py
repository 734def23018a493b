"""Finds stop strings in text that arrives in pieces."""


class StopScanner:
    """Lets text through until one of `stops` appears, holding back only what may be the beginning of one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None, str]:
        """Takes the next piece; returns (text to show, the stop that was found, what followed it).

        The earliest stop wins, and of two at one place the longer one.
        """
        self._held += text
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            at, _, stop = min(found)
            shown, rest = self._held[:at], self._held[at + len(stop) :]
            self._held = ""
            return shown, stop, rest
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None, ""

    def flush(self) -> str:
        """What was held back, once nothing more will come."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
