"""A log that blocks or raises holds up nothing that the supervisor does."""

import json

import pytest

APP = """
import logging, multiprocessing, os, sys, threading, time
from wakaq import WakaQ

wakaq = WakaQ(queues=["default"], concurrency=1, url=os.environ["REDIS_URL"], wait_timeout=0.2)
client = wakaq.broker.client

class Bad(logging.Handler):
    def handle(self, record):
        if "worker" in multiprocessing.current_process().name:
            return
        if record.getMessage().startswith("Started with"):
            client.rpush("log", "reached")
        BODY

if "pytest" not in sys.modules:  # this is a command of the test
    logging.getLogger().addHandler(Bad())

@wakaq.task(hard_timeout=0.5)
def hang():
    time.sleep(60)

@wakaq.task
def note(name):
    client.rpush("done", name)
"""


@pytest.mark.parametrize("body", ["threading.Event().wait()", "raise OSError('the disk is full')"])
def test_a_bad_log_delays_no_kill_and_no_shutdown(start, redis, body):
    worker = start(APP.replace("BODY", body))
    assert redis.blpop("log", timeout=10)
    worker.app.hang.delay()
    worker.app.note.delay("next")

    assert redis.blpop("done", timeout=10)[1] == b"next"
    letter = json.loads(redis.lindex("wakaq:dead:default", 0))
    assert letter["reason"] == "hard timeout"
    assert worker.stop() == 0
    assert redis.keys("wakaq:registry:*") == redis.keys("wakaq:inflight:*") == []
