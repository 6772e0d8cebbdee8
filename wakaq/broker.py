"""Knows the commands of Redis, as no other module does. Not for deciding anything: callers decide, Redis keeps.

State changes are Lua scripts, one file each in `wakaq/lua`, one method of the same name each. Nothing is retried here:
whether a call may be repeated is known only to its caller.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wakaq.client import Client, ResponseError, Wire, pack, script
from wakaq.keys import Keys
from wakaq.message import Call
from wakaq.queue import Queue
from wakaq.settings import Settings
from wakaq.turn import Claim, Lane, Settlement, Turn

PAGE = 1_000  # payloads in one command


class TurnRefused(Exception):
    """This turn's number is not the next one: an earlier one was executed unseen, or this supervisor was declared dead."""


class Broker(Client):
    """What an application, a supervisor, a worker and a scheduler ask of Redis."""

    def __init__(self, settings: Settings, queues: Sequence[Queue]) -> None:
        super().__init__(settings)
        self.queues = queues
        self.keys = Keys(settings.prefix)
        # The start of an RPUSH to each queue, packed once: the hot path of `.delay()` only appends the payload.
        self._heads: dict[str, bytes] = {}

    # -- producers ---------------------------------------------------------------------------------

    def enqueue(self, queue: Queue, payload: bytes) -> None:
        """Append a payload to its queue."""
        head = self._heads.get(queue.name)
        if head is None:
            key = self.keys.of(queue).queue.encode()
            head = b"*3\r\n$5\r\nRPUSH\r\n$%d\r\n%b\r\n$" % (len(key), key)
            self._heads[queue.name] = head
        self.wire().call(b"%b%d\r\n%b\r\n" % (head, len(payload), payload))

    def enqueue_all(self, calls: Sequence[Call]) -> None:
        """Enqueue many calls in few round trips, all of them or none."""
        if not calls:
            return
        with self.client.pipeline(transaction=len(calls) > 1) as pipe:
            self._pipe(pipe, calls)
            pipe.execute()

    async def aenqueue_all(self, calls: Sequence[Call]) -> None:
        """Do the same without blocking the running event loop."""
        async with (
            self.async_client() as client,
            client.pipeline(transaction=len(calls) > 1) as pipe,
        ):
            self._pipe(pipe, calls)
            await pipe.execute()

    def _pipe(self, pipe: Any, calls: Sequence[Call]) -> None:
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

    # -- supervisors: claims -----------------------------------------------------------------------

    def lane(self, queue: Queue, worker_id: str, number: int) -> Lane:
        return Lane(worker_id, queue, number, self.keys.inflight(queue, worker_id, number))

    def turn(
        self,
        worker_id: str,
        fence: tuple[int, int] | None,
        settlements: Iterable[Settlement] = (),
        wants: Iterable[tuple[int, Sequence[Lane]]] = (),
    ) -> list[Claim]:
        """Settle and claim in one round trip: `wants` are pairs of how many payloads, and the lanes in order of priority.

        `fence` has the numbers of the turn before and of this one, and is None for an orphan's acks, which need none.

        Raises:
            TurnRefused: Nothing was done: another turn came between, or the supervisor is not registered.
        """
        turn = Turn(self.keys, worker_id, *(fence or (None, 0)))
        for settlement in settlements:
            turn.settle(settlement, self.settings.dead_letters)
        for want, lanes in wants:
            turn.claim(want, lanes)
        reply = self.run_script("turn", turn.keys, turn.args)
        if reply is None:
            raise TurnRefused
        claims, errors = turn.read(reply)
        for error in errors:
            self.complain(error)
        return claims

    def begin_claim(self, wire: Wire, lane: Lane) -> None:
        """Ask for the next payload of the lane's queue, for `wait_timeout` seconds: a payload, or None, will be received."""
        source, wait = self.keys.of(lane.queue).queue, self.settings.wait_timeout
        wire.send(pack("BLMOVE", source, lane.key, "LEFT", "RIGHT", wait))

    def inflight(
        self, worker_id: str, lanes: Sequence[Lane]
    ) -> tuple[int | None, list[list[bytes]]]:
        """Return the number of the supervisor's last turn, None if it is not registered, and what its lanes hold."""
        with self.client.pipeline(transaction=True) as pipe:
            pipe.hget(self.keys.turns, worker_id)
            for lane in lanes:
                pipe.lrange(lane.key, 0, -1)
            turn, *payloads = pipe.execute(raise_on_error=False)
        self.client.connection_pool.disconnect(inuse_connections=False)  # for a minute, mostly
        if isinstance(turn, Exception):
            raise turn
        for index, lane in enumerate(lanes):
            if isinstance(payloads[index], Exception):
                self.complain(f"{lane.key}: {payloads[index]}")
                payloads[index] = []
        return None if turn is None else int(turn), payloads

    def promote(self, limit: int) -> tuple[int, float]:
        """Move due payloads to their queues; returns how many, and the seconds until the next one is due, maybe inf."""
        keys: list[str] = []
        for queue in self.queues:
            keys += (self.keys.of(queue).eta, self.keys.of(queue).queue)
        reply: bytes = self.run_script("promote", keys, [limit])
        moved, wait, *errors = reply.decode(errors="replace").split("\n")
        for error in errors:
            self.complain(error)
        return int(moved), float(wait)

    def subscribe(self) -> Any:
        """Return a subscription to the broadcasts, on a connection of its own."""
        subscription = self.client.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe(self.keys.broadcast)
        return subscription

    # -- supervisors: lease ------------------------------------------------------------------------

    def register(self, worker_id: str, entry: Mapping[str, object]) -> None:
        """Announce a supervisor, before its first claim."""
        with self.client.pipeline(transaction=True) as pipe:
            pipe.hset(self.keys.registry, worker_id, json.dumps(entry))
            pipe.hset(self.keys.turns, worker_id, "0")
            pipe.execute()

    def unregister(self, worker_id: str) -> None:
        with self.client.pipeline(transaction=True) as pipe:
            pipe.hdel(self.keys.registry, worker_id)
            pipe.hdel(self.keys.turns, worker_id)
            pipe.execute()

    def beat(self, worker_id: str, entry: Mapping[str, object]) -> bool:
        """Renew the entry; False if it is gone: this supervisor was declared dead."""
        args = [worker_id, json.dumps(entry)]
        return bool(self.run_script("beat", [self.keys.registry], args))

    def registry(self) -> dict[str, bytes]:
        """Return each supervisor's entry as it is, for `read_entry`."""
        entries = self.client.hgetall(self.keys.registry)
        return {key.decode(errors="replace"): value for key, value in entries.items()}

    def bury(self, worker_id: str, tombstone: str, entry: bytes) -> bool:
        """Fence a dead supervisor off, and keep its entry as a tombstone, under which its lanes can be found again.

        False if the entry is another by now: the supervisor has moved, or was buried by others.
        """
        keys = [self.keys.registry, self.keys.turns]
        return bool(self.run_script("bury", keys, [worker_id, tombstone, entry]))

    def forget(self, field: str) -> None:
        self.client.hdel(self.keys.registry, field)

    def rescue(self, lane: Lane, pairs: Sequence[tuple[bytes, bytes]]) -> int:
        """Requeue payloads of a dead supervisor's lane, each as its second form; returns how many were still there."""
        keys = self.keys.of(lane.queue)
        payloads = [payload for pair in pairs for payload in pair]
        return int(self.run_script("rescue", [lane.key, keys.queue, keys.stats], payloads))

    def adopt(self, lane: Lane, own: Lane, payload: bytes) -> bool:
        """Move a payload from a dead supervisor's lane to an orphan's; False if it was rescued before."""
        keys = [lane.key, own.key, self.keys.of(lane.queue).stats]
        return bool(self.run_script("rescue", keys, [payload, payload]))

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
        """Return the server's `maxmemory-policy` if it may throw tasks away, None if it cannot, or does not tell."""
        try:
            options = self.client.config_get("maxmemory*")
        except ResponseError:  # forbidden, as hosted servers do
            return None
        policy = str(options.get("maxmemory-policy", "noeviction"))
        return policy if policy != "noeviction" and options.get("maxmemory") != "0" else None


def read_entry(raw: bytes) -> dict[str, Any]:
    """Read a supervisor's entry; one that is no JSON object is empty."""
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
