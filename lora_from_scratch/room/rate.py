"""A limit on how often something may be done: the token bucket."""

from __future__ import annotations

MOST_KEYS = 10_000


class Rate:
    """Each key may do something `burst` times at once, and then once every `seconds`."""

    def __init__(self, burst: int, seconds: float) -> None:
        self.burst, self.seconds = burst, seconds
        self._used: dict[str, tuple[float, float]] = {}  # how many of the burst are used up, and when that was so

    def wait(self, key: str, now: float) -> float:
        """Seconds until the key may do it again; 0 if it may now."""
        return max(0.0, (self._level(key, now) - (self.burst - 1)) * self.seconds)

    def take(self, key: str, now: float) -> None:
        """Count that the key has done it."""
        level = self._level(key, now) + 1
        self._used.pop(key, None)
        self._used[key] = (level, now)
        if len(self._used) > MOST_KEYS:
            del self._used[next(iter(self._used))]  # the one that has done nothing for longest

    def _level(self, key: str, now: float) -> float:
        level, when = self._used.get(key, (0.0, now))
        return max(0.0, level - max(now - when, 0.0) / self.seconds)
