"""What it costs to load pages and to compute them, learnt from what it cost before."""

WEIGHT = 0.3  # of what was measured last
HOPE = 1.05  # by which a rate that was not good enough grows each time, so that it is tried again one day


class Rate:
    """So much a second, as measured; None before that."""

    def __init__(self):
        self.per_second: float | None = None

    def measured(self, amount: int, seconds: float) -> None:
        """So much took so long."""
        new = amount / max(seconds, 1e-9)
        self.per_second = new if self.per_second is None else (1 - WEIGHT) * self.per_second + WEIGHT * new

    def hope(self) -> None:
        """It was too slow to be used, and so is not measured any more."""
        if self.per_second is not None:
            self.per_second *= HOPE

    def seconds(self, amount: int, unknown: float) -> float:
        """How long so much will take."""
        return unknown if self.per_second is None else amount / self.per_second
