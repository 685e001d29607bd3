"""Running a notebook does not sleep beside a reply that has come."""

from __future__ import annotations

import asyncio
import queue
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lora_from_scratch.grading.building.execution import _polling_client


def shell_of(monkeypatch: pytest.MonkeyPatch, replies: list[str | None]) -> tuple[Any, list[float]]:
    """The client's shell channel over one that says these in turn (None: nothing came), and how long it was to wait."""
    waits: list[float] = []

    async def get_msg(timeout: float) -> str:
        waits.append(timeout)
        reply = replies.pop(0) if replies else None
        if reply is None:
            await asyncio.sleep(min(timeout, 0.01))
            raise queue.Empty
        return reply

    async def start(self: NotebookClient) -> Any:
        return SimpleNamespace(shell_channel=SimpleNamespace(get_msg=get_msg))

    monkeypatch.setattr(NotebookClient, "async_start_new_kernel_client", start)
    client = _polling_client()(nbformat.v4.new_notebook())
    return asyncio.run(client.async_start_new_kernel_client()).shell_channel, waits


def test_a_reply_that_woke_nobody_is_found_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, waits = shell_of(monkeypatch, [None, None, "reply"])
    assert asyncio.run(shell.get_msg(timeout=300)) == "reply"
    assert len(waits) == 3
    assert max(waits) <= 1


def test_a_reply_that_never_comes_is_still_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, _ = shell_of(monkeypatch, [])
    with pytest.raises(queue.Empty):
        asyncio.run(shell.get_msg(timeout=0.05))
