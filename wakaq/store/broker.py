"""What an application, a supervisor, a worker and a scheduler ask of Redis.

State changes are Lua scripts, one file each in `wakaq/store/lua`. Nothing is retried here: whether
a call may be repeated is known only to its caller. Not for turns, which are `turns`, nor for the
registry, which is `registry`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from wakaq.message import Call
from wakaq.queue import Queue
from wakaq.settings import Settings
from wakaq.store.connection import Client, ResponseError, pack, script
from wakaq.store.keys import Keys, SlotGroup

PAGE = 1_000  # payloads in one command


class Broker(Client):
    """Connections that know the commands."""

    def __init__(self, settings: Settings, queues: Sequence[Queue]) -> None:
        super().__init__(settings)
        self.queues = queues
        self.keys = Keys(settings.prefix)
        self.groups = self.keys.groups(queues)
        # The start of an RPUSH to each queue, packed once: `.delay()` only appends the payload.
        self._pushes: dict[Queue, bytes] = {}

    # -- producers ---------------------------------------------------------------------------------

    def enqueue(self, queue: Queue, payload: bytes) -> None:
        """Append a payload to its queue."""
        push = self._pushes.get(queue)
        if push is None:
            key = self.keys.of(queue).queue.encode()
            push = b"*3\r\n$5\r\nRPUSH\r\n$%d\r\n%b\r\n$" % (len(key), key)
            self._pushes[queue] = push
        self.connection().call(b"%b%d\r\n%b\r\n" % (push, len(payload), payload))

    def enqueue_all(self, calls: Sequence[Call]) -> None:
        """Enqueue many calls in few round trips, all of them or none."""
        if not calls:
            return
        with self.client.pipeline(transaction=len(calls) > 1) as pipe:
            self._add_calls(pipe, calls)
            pipe.execute()

    async def aenqueue_all(self, calls: Sequence[Call]) -> None:
        """Do the same without blocking the running event loop."""
        async with (
            self.async_client() as client,
            client.pipeline(transaction=len(calls) > 1) as pipe,
        ):
            self._add_calls(pipe, calls)
            await pipe.execute()

    def _add_calls(self, pipe: Any, calls: Sequence[Call]) -> None:
        waiting: dict[str, list[bytes]] = {}
        for call in calls:
            keys = self.keys.of(call.queue)
            if call.at is not None:
                pipe.zadd(keys.eta, {call.payload: call.at}, nx=True)
            elif call.delay:
                pipe.eval(script("delay")[0], 1, keys.eta, call.payload, call.delay)
            else:
                waiting.setdefault(keys.queue, []).append(call.payload)
        for key, payloads in waiting.items():
            for start in range(0, len(payloads), PAGE):
                pipe.rpush(key, *payloads[start : start + PAGE])

    def publish(self, payload: bytes) -> int:
        """Broadcast a payload; returns how many supervisors are listening."""
        return int(self.client.publish(self.keys.broadcast, payload))

    # -- supervisors -------------------------------------------------------------------------------

    def wait_for_work(self, queue: Queue) -> bool:
        """Wait up to `wait_timeout` for a payload in a queue.

        Returns whether one is in its head now.
        """
        keys = self.keys.of(queue)
        wait = self.settings.wait_timeout
        command = pack("BLMOVE", keys.queue, keys.head, "LEFT", "RIGHT", wait)
        return self.connection().call(command) is not None

    def put_head_back(self, queue: Queue) -> None:
        """Move the last payload of a queue's head back to its front, for others who wait there."""
        keys = self.keys.of(queue)
        self.connection().call(pack("LMOVE", keys.head, keys.queue, "RIGHT", "LEFT"))

    def promote(self, group: SlotGroup, limit: int) -> tuple[int, float]:
        """Move due payloads to their queues.

        Returns how many, at most `limit`, and the seconds until the next one is due, maybe inf.
        """
        keys: list[str] = []
        for queue in group.queues:
            keys += (self.keys.of(queue).eta, self.keys.of(queue).queue)
        reply: bytes = self.run_script("promote", keys, [limit])
        moved, wait, *errors = reply.decode(errors="replace").split("\n")
        for error in errors:
            self.report_refusal(error)
        return int(moved), float(wait)

    def subscribe(self) -> Any:
        """Return a subscription to the broadcasts, on a connection of its own."""
        subscription = self.client.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe(self.keys.broadcast)
        return subscription

    def register(
        self, group: SlotGroup, supervisor_id: str, entry: Mapping[str, object]
    ) -> str | None:
        """Announce a supervisor; returns the token for its first turn, None if the id is taken."""
        keys, args = [group.turns, group.registry], [supervisor_id, json.dumps(entry)]
        token: bytes | None = self.run_script("register", keys, args)
        return None if token is None else token.decode()

    # -- the scheduler -----------------------------------------------------------------------------

    def time(self) -> float:
        """Return the server's unix time in seconds."""
        seconds, microseconds = self.client.time()
        return float(seconds + microseconds / 1e6)

    def fire(self, queue: Queue, identity: str, tick: float, payload: bytes, remember: int) -> bool:
        """Enqueue one tick of a schedule; False if it was enqueued before."""
        keys = [self.keys.cron(queue, identity), self.keys.of(queue).queue]
        return bool(self.run_script("fire", keys, [f"{tick:.6f}", payload, remember]))

    def risk_of_eviction(self) -> str | None:
        """Return the server's `maxmemory-policy` if it may throw tasks away.

        None if it cannot, or does not tell.
        """
        try:
            options = self.client.config_get("maxmemory*")
        except ResponseError:  # forbidden, as hosted servers do
            return None
        policy = str(options.get("maxmemory-policy", "noeviction"))
        return policy if policy != "noeviction" and options.get("maxmemory") != "0" else None
