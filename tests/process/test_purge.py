"""`wakaq-purge`: it empties one queue, and says how many tasks that were."""

from datetime import timedelta

import pytest

APP = """
import os
from wakaq import WakaQ

wakaq = WakaQ(queues=["emails", "reports"], url=os.environ["REDIS_URL"], prefix="shop")


@wakaq.task
def send(number): ...
"""


def test_a_purge_empties_one_queue_pending_and_delayed(start, load_app, redis):
    app = load_app(APP)
    for queue in ("emails", "reports"):
        for number in range(3):
            app.send.delay(number, queue=queue)
        app.send.delay(9, queue=queue, eta=timedelta(hours=1))
    redis.rpush("shop:dead:emails", b"letter")
    command = start(app, "purge", "--queue=emails")

    assert command.wait() == 0
    assert command.output == "Dropped 3 pending and 1 delayed tasks of queue 'emails'\n"
    assert sorted(redis.keys()) == [b"shop:dead:emails", b"shop:eta:reports", b"shop:reports"]


def test_what_a_wake_up_has_moved_is_purged_as_well(start, redis):
    redis.rpush("shop:emails", b"second", b"third")
    redis.rpush("shop:head:emails", b"first")
    command = start(APP, "purge", "--queue=emails")

    assert command.wait() == 0
    assert command.output == "Dropped 3 pending and 0 delayed tasks of queue 'emails'\n"
    assert redis.keys() == []


def test_an_empty_queue_is_no_error(start):
    command = start(APP, "purge", "--queue=emails")

    assert command.wait() == 0
    assert command.output == "Dropped 0 pending and 0 delayed tasks of queue 'emails'\n"


@pytest.mark.parametrize("command", ["purge --queue=emails", "info", "dead retry --queue=emails 0"])
def test_a_wrong_password_is_one_line(start, redis_tcp_server, command):
    url = redis_tcp_server.url.replace("s3cret", "guess")
    command = start(APP, command, url=url)

    assert command.wait() == 2
    assert command.log.startswith("wakaq: Redis cannot be used: ")
    assert "password" in command.log
    assert "guess" not in command.log
    assert command.log.count("\n") == 1


def test_a_key_of_a_wrong_type_is_named(start, redis):
    redis.set("shop:emails", 1)
    command = start(APP, "purge", "--queue=emails")

    assert command.wait() == 2
    assert command.log.startswith("wakaq: Redis refuses: ")
    assert "shop:emails" in command.log
    assert command.log.count("\n") == 1
    assert redis.get("shop:emails") == b"1"
