"""Which of several queues an idle worker serves first when they fill together."""

import itertools

APP = """
from wakaq import WakaQ
import os

wakaq = WakaQ(queues=[(0, "high"), (1, "middle"), (2, "low")], url=os.environ["REDIS_URL"],
    concurrency=1)

@wakaq.task
def note(name): wakaq.broker.client.rpush("done", name)
"""


def test_an_idle_worker_takes_the_more_urgent_of_what_arrives_together(start, redis, eventually):
    worker = start(APP)
    worker.workers(1)
    note = worker.app.note
    orders = list(itertools.permutations(["high", "middle", "low"])) * 8
    for order in orders:
        # All three queues are waited for: BLMOVE of this worker, on a connection each.
        eventually(lambda: redis.info("clients")["blocked_clients"] == 3)
        with worker.app.wakaq.batch():
            for queue in order:
                note.delay(queue, queue=queue)
        names = [redis.blpop("done", timeout=5)[1] for _ in range(3)]

        assert names == [b"high", b"middle", b"low"]
