"""Progress on a terminal: one bar for reading, training, scoring and generating. Elsewhere nothing is shown."""

import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console


class ProgressBar:
    """A bar with the share done, the time so far and the time left, in a `with` block. It disappears at the end."""

    def __init__(self, what: str, total: float, console: "Console | None" = None, enabled: bool = True) -> None:
        """what: the text in front of the bar. total: the amount that is 100%. console: where messages go meanwhile, so
        that they appear above the bar; None: stderr. enabled: False: show nothing."""
        self.bar: Any = None
        if not (enabled and (sys.stderr.isatty() if console is None else console.is_terminal)):
            return
        from rich.console import Console
        from rich.progress import Progress, TextColumn, TimeElapsedColumn

        text, bar, share, left = Progress.get_default_columns()
        columns = text, bar, share, TimeElapsedColumn(), left, TextColumn("left")
        self.bar = Progress(*columns, console=console or Console(stderr=True), transient=True)
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, amount: float) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, amount)

    def update(self, done: float, what: str | None = None) -> None:
        """`done`: the whole amount so far. `what`: a new text, None keeps it."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=what)
