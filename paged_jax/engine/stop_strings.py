"""The strings that end a text, found while it comes; the cost is linear in the text."""

from collections.abc import Iterable


class StopStrings:
    """Holds back what may become a stop string, and cuts the text where one is complete.

    Args:
        strings: the strings that end a text; they are no part of it.
    """

    def __init__(self, strings: Iterable[str]):
        self._strings = tuple(strings)
        if not all(self._strings):
            raise ValueError("a stop string is empty, so it would end every text before it begins: leave it out.")
        self._borders = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)  # characters of each that the text ends with
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that no stop string can take back any more; nothing after one was found, which `found` then names.

        Args:
            piece: the next part of the text.
        """
        if self.found is not None:
            return ""
        text = self._held + piece
        for end in range(len(self._held), len(text)):
            self._step(text[end])
            ended = [s for s, n in zip(self._strings, self._matched, strict=True) if n == len(s)]
            if ended:
                self.found, self._held = max(ended, key=len), ""
                return text[: end + 1 - len(self.found)]
        num_held = max(self._matched, default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held, self._matched = self._held, "", [0] * len(self._strings)
        return held

    def _step(self, character: str) -> None:
        for i, (string, borders) in enumerate(zip(self._strings, self._borders, strict=True)):
            length = self._matched[i]
            while length and string[length] != character:
                length = borders[length]
            self._matched[i] = length + (string[length] == character)


def _borders(string: str) -> list[int]:
    """For each prefix, how long its longest proper prefix is that is its suffix, too (Knuth, Morris and Pratt)."""
    borders = [0, 0]
    for end in range(1, len(string)):
        length = borders[-1]
        while length and string[length] != string[end]:
            length = borders[length]
        borders.append(length + (string[length] == string[end]))
    return borders
