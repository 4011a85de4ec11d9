"""What a trial's actor and the workers of its trainer tell each other: an actor between them."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle


class Order(NamedTuple):
    """One more epoch of a trial."""

    trial: int
    params: dict[str, Any]


class Mailbox:
    """Holds one order until it is answered, so workers that are started again find it too."""

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
        """Return the order that is not answered yet, once there is one; None at the end."""
        await self._is_asked.wait()
        return self._order

    async def answer(self, result: dict[str, Any]) -> None:
        """Answer the order."""
        self._is_asked.clear()
        self._answer.set_result(result)

    async def close(self) -> None:
        """Tell that no order will come any more."""
        self._order = None
        self._is_asked.set()


def start_mailbox() -> ActorHandle:
    """Return a mailbox; it ends with the process that has started it."""
    return ray.remote(num_cpus=0)(Mailbox).remote()
