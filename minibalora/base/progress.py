"""Show progress: a bar on a terminal; in a file or a pipe, a line every 30 seconds and one at the end."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class Progress:
    """A count of finished units, shown on standard error while the `with` block runs.

    The rate is an average: units finished since the start, over the time since the start.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        first: int = 0,
        delay: float = 0,
        is_shown: bool = True,
        stays: bool = False,
    ):
        """first: units finished before; delay: seconds until anything is shown; stays: leave the bar on the terminal
        at the end."""
        self.name, self.total, self.first, self.count = name, total, first, first
        self.delay, self.note = delay, ""
        self.is_shown, self.bar = is_shown, None
        self.started = self.last_line = time.monotonic()
        if is_shown and sys.stderr.isatty():
            # smoothing=0 shows the average rate; otherwise, tqdm uses only the time since its last refresh.
            self.bar = tqdm(desc=name, total=total, unit=unit, initial=first, delay=delay, smoothing=0, miniters=0,
                            dynamic_ncols=True, leave=stays)  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.is_shown and time.monotonic() >= self.started + self.delay:
            self._write_line()

    def update(self, finished: int = 1, note: str = "") -> None:
        """Add finished units. note: replaces the text after the count."""
        self.count, self.note = self.count + finished, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(finished)
        elif self.is_shown and self.count < self.total and time.monotonic() >= self.last_line + SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self) -> None:
        self.last_line = time.monotonic()
        print(self.line(self.last_line - self.started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Return the count, the rate and the time left, `seconds` after the start."""
        parts = [f"{self.name}: {self.count:,} of {self.total:,}"]
        finished, left = self.count - self.first, self.total - self.count
        if finished > 0 and seconds > 0:
            pace = seconds / finished
            parts.append(f"{pace:.1f} s each" if pace >= 1 else f"{1 / pace:.1f} a second")
            parts.append(f"about {in_words(left * pace)} left" if left > 0 else f"{in_words(seconds)} in all")
        return ", ".join([*parts, self.note] if self.note else parts)


def over(items: Iterable, name: str, unit: str, delay: float = 0, is_shown: bool = True) -> Iterator:
    """Yield the items of a list, and show how many are finished."""
    with Progress(name, len(items), unit, delay=delay, is_shown=is_shown and len(items) > 0) as progress:
        for item in items:
            yield item
            progress.update()


def in_words(seconds: float) -> str:
    """Return a duration in a suitable unit: "40 seconds", "3 minutes", "2.5 hours"."""
    if seconds < 90:
        return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def say(line: str) -> None:
    """Print a line on standard output, above any bars."""
    with tqdm.external_write_mode():
        print(line, flush=True)
