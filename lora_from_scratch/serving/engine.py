"""Runs a scheduler in its own thread and passes its results to an asyncio program."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from lora_from_scratch.serving.scheduler import Event, Request, Scheduler
from lora_from_scratch.support.contention import watch

logger = logging.getLogger(__name__)


class QueueFull(Exception):  # noqa: N818
    """The maximum number of requests is already waiting."""


class Engine:
    """Runs requests for the coroutines of one event loop.

    Args:
        scheduler: must not be used by other code afterwards.
        max_waiting: the maximum number of waiting requests, in addition to the running ones.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int) -> None:
        self.scheduler, self.max_waiting = scheduler, max_waiting
        self.active: dict[Request, asyncio.Queue[Event]] = {}  # used only in the event loop's thread
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Call this in the event loop."""
        watch()  # other programs may need the processors too
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the current forward pass. Requests that are still running are dropped."""
        self._inbox.put(None)
        self._thread.join()
        self.scheduler.store.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def run(self, requests: Sequence[Request]) -> AsyncGenerator[Event, None]:
        """Run requests and yield their events until all of them are finished.

        If the generator is closed earlier, the remaining requests are cancelled.

        Raises:
            QueueFull: too many requests are waiting. None of the given requests is started.
            ValueError: one of the requests cannot be run. None of them is started.
        """
        if len(self.active) + len(requests) > self.scheduler.max_rows + self.max_waiting:
            raise QueueFull
        for request in requests:
            self.scheduler.check(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self.active |= dict.fromkeys(requests, events)
        for request in requests:
            self._inbox.put(partial(self.scheduler.submit, request))
        try:
            left = len(requests)
            while left:
                event = await events.get()
                left -= event.finished is not None
                yield event
        finally:
            for request in requests:
                if self.active.pop(request, None) is not None:
                    self._inbox.put(partial(self.scheduler.cancel, request))

    # --- The thread ---

    def _work(self) -> None:
        while self._take_orders():
            try:
                events = self.scheduler.step()
            except Exception:
                logger.exception("a forward pass has failed")
                events = self._give_up()
            if events and self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _take_orders(self) -> bool:
        """Process the inbox, waiting for an entry if the scheduler is idle. Returns False if the thread must stop."""
        idle = not self.scheduler.running and not self.scheduler.waiting
        while idle or not self._inbox.empty():
            order = self._inbox.get()
            if order is None:
                return False
            order()
            idle = False
        return True

    def _give_up(self) -> list[Event]:
        """Let all running requests fail. Waiting requests are kept."""
        failed = list(self.scheduler.running)
        for request in failed:
            self.scheduler.cancel(request)
        return [Event(request, finished="failure") for request in failed]

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.request in self.active:
                self.active[event.request].put_nowait(event)
