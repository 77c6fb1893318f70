"""Strings that end a text, found across token boundaries; what may yet begin one is held back."""


class StopText:
    """Passes text through up to the first of the stop strings; holds back what may yet turn out to begin one."""

    def __init__(self, stops: list[str]):
        if "" in stops:
            raise ValueError("a stop text must have at least one character, but an empty one came; leave it out.")
        self.stops, self.found, self._held = stops, False, ""

    def push(self, text: str) -> str:
        """What can be shown now."""
        self._held += text
        hits = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if hits:
            self.found = True
            shown, self._held = self._held[: min(hits)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and began no stop string after all."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
