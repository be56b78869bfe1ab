"""A clock that goes when it is told to."""


class Clock:
    """Stands where `time.monotonic` stands."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
