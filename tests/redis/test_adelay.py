"""`adelay`: as `delay`, but for event loops, of which a process may have several."""

import asyncio
import json
import signal
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
import redis as redis_py

from wakaq import UnknownQueue, WakaQ


@pytest.fixture
def make_app(app_url):
    """Return a function that makes an application with the tasks `note` and `anote`."""
    apps = []

    def make(url=app_url, **options):
        app = WakaQ(queues=["high", "low"], url=url, **options)

        @app.task
        def note(number=0, **more): ...

        @app.task(queue="high")
        async def anote(number=0): ...

        apps.append(app)
        return app

    yield make
    for app in apps:
        app.broker.close()


@pytest.fixture
def app(make_app):
    return make_app()


def numbers(redis, key="wakaq:low"):
    return [json.loads(payload)["args"][0] for payload in redis.lrange(key, 0, -1)]


def test_it_sends_what_delay_sends(app, redis):
    note, eta = app.tasks["note"], datetime(2099, 1, 1, tzinfo=UTC)
    arguments = (1, timedelta(days=1), b"\0"), {"deep": [{"a": datetime(2020, 1, 1, tzinfo=UTC)}]}

    async def main():
        await note.adelay(arguments)
        await note.adelay(arguments, queue="high")
        await note.adelay(arguments, eta=eta)
        await note.using(queue="high", eta=eta).adelay(arguments)
        await app.tasks["anote"].adelay(5)

    def state():
        lists = {key: redis.lrange(key, 0, -1) for key in redis.keys("wakaq:[hl]*")}
        sets = {key: redis.zrange(key, 0, -1, withscores=True) for key in redis.keys("wakaq:eta:*")}
        redis.flushall()
        return lists | sets

    asyncio.run(main())
    by_adelay = state()
    note.delay(arguments)
    note.delay(arguments, queue="high")
    note.delay(arguments, eta=eta)
    note.using(queue="high", eta=eta).delay(arguments)
    app.tasks["anote"].delay(5)

    assert by_adelay == state()
    assert len(by_adelay) == 4


def test_a_delta_counts_on_the_servers_clock(app, redis):
    before = app.broker.time()
    asyncio.run(app.tasks["note"].adelay(1, eta=timedelta(seconds=60)))

    ((_, due),) = redis.zrange("wakaq:eta:low", 0, -1, withscores=True)
    assert before + 60 <= due <= app.broker.time() + 60


@pytest.mark.parametrize(
    ("error", "args", "options"),
    [
        (TypeError, [1, 2], {}),
        (TypeError, [object()], {}),
        (ValueError, [float("nan")], {}),
        (UnknownQueue, [1], {"queue": "nope"}),
        (TypeError, [1], {"eta": "tomorrow"}),
    ],
)
def test_it_raises_what_delay_raises_and_sends_nothing(app, redis, error, args, options):
    with pytest.raises(error) as by_delay:
        app.tasks["note"].delay(*args, **options)
    with pytest.raises(error) as by_adelay:
        asyncio.run(app.tasks["note"].adelay(*args, **options))

    assert str(by_delay.value) == str(by_adelay.value)
    assert redis.keys("*") == []


def test_a_thousand_at_once_need_few_connections(app, redis):
    async def main():
        await asyncio.gather(*(app.tasks["note"].adelay(number) for number in range(1_000)))
        return redis.info("clients")["connected_clients"]

    connections = asyncio.run(main())

    assert sorted(numbers(redis)) == list(range(1_000))
    assert connections < 60


def test_one_after_another_they_arrive_in_order_on_one_connection(app, redis):
    async def main():
        for number in range(100):
            await app.tasks["note"].adelay(number)

    before = redis.info("stats")["total_connections_received"]
    asyncio.run(main())

    assert numbers(redis) == list(range(100))
    assert redis.info("stats")["total_connections_received"] <= before + 1


def test_loops_one_after_another_have_clients_of_their_own_and_leave_nothing(app, redis):
    for number in range(50):
        asyncio.run(app.tasks["note"].adelay(number))

    assert numbers(redis) == list(range(50))
    assert len(app.broker._async_clients) <= 1
    assert redis.info("clients")["connected_clients"] <= 3


def test_a_loop_that_was_only_closed_is_forgotten_by_the_next_one(app, redis):
    for number in range(5):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(app.tasks["note"].adelay(number))
        # What asyncio.run does, and who ends a loop by hand may not do.
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    assert numbers(redis) == list(range(5))
    assert len(app.broker._async_clients) == 1


def test_several_loops_at_once_do_not_disturb_each_other(app, redis):
    def run(start):
        async def main():
            for number in range(start, start + 50):
                await app.tasks["note"].adelay(number)

        asyncio.run(main())

    threads = [threading.Thread(target=run, args=[100 * i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    expected = [100 * i + number for i in range(8) for number in range(50)]
    assert sorted(numbers(redis)) == expected


def test_a_cancelled_call_leaves_no_reply_to_the_next_one(make_app, make_server):
    server = make_server()
    note = make_app(server.url).tasks["note"]

    async def main():
        await note.adelay(0)
        server.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(note.adelay(1), 0.1)
        finally:
            server.process.send_signal(signal.SIGCONT)
        for number in range(2, 10):
            await note.adelay(number)

    asyncio.run(main())

    with closing(server.client()) as client:
        assert numbers(client) in ([0, *range(1, 10)], [0, *range(2, 10)])


def test_while_redis_hangs_the_loop_goes_on(make_app, make_server):
    server = make_server()
    note = make_app(server.url).tasks["note"]

    async def main():
        await note.adelay(0)
        server.process.send_signal(signal.SIGSTOP)
        call = asyncio.create_task(note.adelay(1))
        began, longest = time.monotonic(), 0.0
        for _ in range(50):
            before = time.monotonic()
            await asyncio.sleep(0.002)
            longest = max(longest, time.monotonic() - before)
        assert not call.done()
        server.process.send_signal(signal.SIGCONT)
        await call
        assert time.monotonic() - began < 5
        return longest

    assert asyncio.run(main()) < 0.5
    with closing(server.client()) as client:
        assert numbers(client) == [0, 1]


def test_without_redis_it_raises_at_once_and_works_when_it_is_back(make_app, make_server):
    server = make_server()
    note = make_app(server.url).tasks["note"]

    async def main():
        await note.adelay(0)
        server.kill()
        began = time.monotonic()
        with pytest.raises(redis_py.ConnectionError):
            await note.adelay(1)
        assert time.monotonic() - began < 1
        server.start()
        await note.adelay(2)

    asyncio.run(main())

    with closing(server.client()) as client:
        assert numbers(client) == [2]


def test_it_joins_a_batch_of_its_own_context_only(app, redis):
    async def within(begun, done):
        with app.batch():
            await app.tasks["note"].adelay(1)
            begun.set()
            await done.wait()
            await app.tasks["note"].adelay(2)
            assert 1 not in numbers(redis)

    async def beside(begun, done):
        await begun.wait()
        await app.tasks["note"].adelay(3)
        done.set()

    async def main():
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(within(*events), beside(*events))

    asyncio.run(main())

    assert numbers(redis) == [3, 1, 2]


def test_in_synchronous_mode_it_runs_here_and_needs_no_redis(make_app):
    app = make_app(url="unix:///nowhere", synchronous_mode=True)
    seen = []

    @app.task
    async def see(what):
        await asyncio.sleep(0)
        seen.append((what, asyncio.get_running_loop()))

    async def main():
        await see.adelay("it")
        return asyncio.get_running_loop()

    loop = asyncio.run(main())

    assert seen == [("it", loop)]


def test_a_starlette_application_enqueues(app, redis):
    applications = pytest.importorskip("starlette.applications")
    responses = pytest.importorskip("starlette.responses")
    routing = pytest.importorskip("starlette.routing")

    async def enqueue(request):
        await app.tasks["note"].adelay(int(request.path_params["number"]))
        return responses.PlainTextResponse("accepted", 202)

    web = applications.Starlette(routes=[routing.Route("/note/{number}", enqueue)])

    async def get(path):
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
        sent = []

        async def receive():
            return {"type": "http.request"}

        async def send(message):
            sent.append(message)

        await web(scope, receive, send)
        return sent[0]["status"]

    async def main():
        return await asyncio.gather(*(get(f"/note/{number}") for number in range(200)))

    assert asyncio.run(main()) == [202] * 200
    assert sorted(numbers(redis)) == list(range(200))
