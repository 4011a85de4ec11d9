"""A mailbox actor between a trial's actor and the workers of its trainer."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle


class Order(NamedTuple):
    """An order to train one more epoch of a trial."""

    trial: int
    params: dict[str, Any]


class Mailbox:
    """Holds one order until it is answered, so that restarted workers find it too."""

    def __init__(self) -> None:
        self._order: Order | None = None
        self._is_asked = asyncio.Event()
        self._answer: asyncio.Future[dict[str, Any]] = asyncio.Future()

    async def ask(self, order: Order) -> dict[str, Any]:
        """Give an order; return its answer."""
        self._order, self._answer = order, asyncio.Future()
        self._is_asked.set()
        return await self._answer

    async def order(self) -> Order | None:
        """Wait for an unanswered order and return it; None at the end."""
        await self._is_asked.wait()
        return self._order

    async def answer(self, result: dict[str, Any]) -> None:
        """Answer the order."""
        self._is_asked.clear()
        self._answer.set_result(result)

    async def close(self) -> None:
        """End the mailbox: no more orders will come."""
        self._order = None
        self._is_asked.set()


def start_mailbox() -> ActorHandle:
    """Return a mailbox; it ends with the process that started it."""
    return ray.remote(num_cpus=0)(Mailbox).remote()
