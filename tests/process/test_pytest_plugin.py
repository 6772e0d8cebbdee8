"""The fixtures for applications' tests, as an application's tests use them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SHOP = """
import os
from wakaq import WakaQ

wakaq = WakaQ(queues=[(0, "payments"), "emails"], port=1, concurrency=1,
    url=os.getenv("SHOP_REDIS"))
log = []

@wakaq.task(queue="payments")
def charge(order, cents=0):
    log.append((order, cents))

@wakaq.task
async def send(*recipients): ...

def buy(order):
    charge.delay(order, cents=100)
"""


@pytest.fixture
def check(pytester, monkeypatch):
    """Run tests of an application in a process of their own.

    Returns the counts of their outcomes and the output.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def check(tests: str, option: str = "shop.wakaq") -> tuple[dict[str, int], str]:
        pytester.makepyfile(shop=SHOP, test_shop=tests)
        pytester.makeini(
            f"[pytest]\npythonpath = .\nwakaq_app = {option}\nfilterwarnings = error\n"
        )
        result = pytester.runpytest_subprocess("-p", "pytest_wakaq", "-p", "no:randomly")
        return result.parseoutcomes(), result.stdout.str()

    return check


def test_tasks_run_in_place_in_the_test_that_asks_for_it(check):
    outcomes, _ = check("""
        import pytest, redis, shop

        def test_it_runs(wakaq_in_place):
            shop.buy(7)
            shop.charge.broadcast(8)
            assert shop.log == [(7, 100), (8, 0)]
            assert wakaq_in_place is shop.wakaq

        def test_later_it_does_not():
            with pytest.raises(redis.ConnectionError):
                shop.buy(7)
            shop.wakaq.broker.close()
    """)

    assert outcomes == {"passed": 2}


def test_what_is_enqueued_is_recorded_without_redis(check):
    outcomes, _ = check("""
        import asyncio, shop
        from datetime import UTC, datetime, timedelta
        from decimal import Decimal
        import pytest

        def test_one(wakaq_enqueued):
            assert wakaq_enqueued == []
            shop.buy(7)
            (call,) = wakaq_enqueued
            assert call.task is shop.charge
            assert (call.args, call.kwargs) == ([7], {"cents": 100})
            assert (call.queue, call.eta) == ("payments", None)
            assert shop.log == []

        def test_options(wakaq_enqueued):
            at = datetime(2030, 1, 2, 3, 4, 5, 678901)
            shop.charge.delay(1, queue="emails", eta=timedelta(seconds=10))
            shop.charge.delay(Decimal("1.50"), eta=at)
            asyncio.run(shop.send.adelay("a", "b"))
            assert shop.charge.broadcast(4) == 1
            assert [(c.task.name, c.args, c.queue, c.eta) for c in wakaq_enqueued] == [
                ("charge", [1], "emails", timedelta(seconds=10)),
                ("charge", [Decimal("1.50")], "payments", at.replace(tzinfo=UTC)),
                ("send", ["a", "b"], "emails", None),
                ("charge", [4], None, None),
            ]

        def test_errors_and_batches_are_those_of_the_application(wakaq_enqueued):
            with pytest.raises(TypeError):
                shop.charge.delay(object())
            with pytest.raises(ZeroDivisionError), shop.wakaq.batch():
                shop.buy(1)
                1 / 0
            assert wakaq_enqueued == []
            with shop.wakaq.batch():
                shop.buy(2)
                assert wakaq_enqueued == []
            assert wakaq_enqueued[0].args == [2]
    """)

    assert outcomes == {"passed": 3}


def test_a_real_worker_runs_tasks_of_a_real_server(check):
    outcomes, output = check("""
        import os, subprocess, sys, time
        import shop

        def test_it(wakaq_server):
            shop.buy(7)
            assert shop.wakaq.broker.client.llen("wakaq:payments") == 1
            line = [sys.executable, "-m", "wakaq", "worker", "--app=shop.wakaq"]
            worker = subprocess.Popen(line, env=os.environ | {"SHOP_REDIS": wakaq_server})
            deadline = time.monotonic() + 10
            while not shop.wakaq.broker.client.hget("wakaq:stats:payments", "done"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            worker.terminate()
            assert worker.wait() == 0

        def test_the_next_server_is_empty(wakaq_server):
            assert shop.wakaq.broker.client.keys() == []
    """)

    assert outcomes == {"passed": 2}, output


def test_an_application_of_ones_own_is_used(check):
    outcomes, _ = check(
        """
        import pytest
        from wakaq import WakaQ

        @pytest.fixture
        def wakaq_app():
            return WakaQ(queues=["other"])

        def test_it(wakaq_app, wakaq_enqueued):
            wakaq_app.task(print).delay("x")
            assert wakaq_enqueued[0].queue == "other"
        """,
        option="",
    )

    assert outcomes == {"passed": 1}


def test_without_the_option_the_remedy_is_told(check):
    outcomes, output = check("def test_it(wakaq_enqueued): ...", option="")

    assert outcomes == {"errors": 1}
    assert "set wakaq_app in pytest's configuration" in output


def test_who_does_not_use_it_imports_nothing_of_it():
    program = (
        "import pytest, sys; import pytest_wakaq; print({'wakaq', 'redis'} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)

    assert output == "set()\n"
