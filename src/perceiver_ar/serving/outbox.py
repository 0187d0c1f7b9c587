"""From the engine's thread to the event loop."""

import asyncio
from contextlib import suppress
from typing import Any


class Outbox:
    """Collects results for queues of the event loop, and delivers them together after each turn of the engine.

    A wake-up of the event loop for every token would make the engine wait for the interpreter's lock as often.
    """

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop of the queues, set when it runs."""
        self._results = list[tuple[asyncio.Queue[Any], Any]]()

    def put(self, queue: asyncio.Queue[Any], result: Any) -> None:
        self._results.append((queue, result))

    def flush(self) -> None:
        results, self._results = self._results, []
        if results and self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and with it every connection
                self.loop.call_soon_threadsafe(_deliver, results)


def _deliver(results: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, result in results:
        queue.put_nowait(result)
