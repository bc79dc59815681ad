"""How many dbt processes a worker may have at one time, and who waits for one to end."""

import asyncio


class Slots:
    """A counter that can be waited for."""

    def __init__(self, count: int) -> None:
        self.free = count
        self._changed = asyncio.Condition()

    def take_now(self) -> bool:
        if self.free == 0:
            return False
        self.free -= 1
        return True

    async def take(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.free > 0)
            self.free -= 1

    async def give(self) -> None:
        async with self._changed:
            self.free += 1
            self._changed.notify_all()

    async def some_free(self) -> None:
        """Until there is one, which somebody else may be quicker to take."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.free > 0)


class Slot:
    """One request's slot, lent to others while the request waits for something else."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._held = slots, True

    async def lend(self) -> None:
        if self._held:
            self._held = False
            await self._slots.give()

    async def take(self) -> None:
        """Have it again, when there is one."""
        if not self._held:
            await self._slots.take()
            self._held = True
