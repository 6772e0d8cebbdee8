import asyncio
import contextvars
import runpy
import threading
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from wakaq import ConfigError, CronTask, UnknownQueue, UnknownTask, WakaQ, WakaQError
from wakaq.store.broker import Broker


@pytest.fixture
def note(app):
    @app.task
    def note(value): ...

    return note


def values(broker):
    return [call.payload.split(b'"args": ')[1].split(b', "kwargs"')[0] for call in broker.calls]


def test_the_documented_application_is_what_it_says(broker):
    shop = runpy.run_path(str(Path(__file__).with_name("shop.py")))
    app = shop["wakaq"]
    app.broker = broker
    app.validate()

    shop["charge"].delay(1, 100, queue=shop["LOW"])
    shop["daily_report"].delay(eta=timedelta(seconds=10))

    assert [queue.name for queue in app.queues] == ["payments", "emails", "imports", "reports"]
    assert app.default_queue.name == "reports"
    assert [call.queue.name for call in broker.calls] == ["reports", "reports"]
    assert [task.is_async for task in app.tasks.values()] == [False, False, True]
    policy = app.policy(shop["send_reminders"], app.queues_by_name["emails"])
    assert (policy.soft_timeout, policy.hard_timeout, policy.max_retries) == (30.0, 60.0, 3)
    assert policy.delay_before(1) == 30.0
    assert len(app.schedules) == 3
    assert app.after_worker_started_hooks == [shop["connect"]]
    assert app.before_task_started_hooks == [shop["start_timer"]]
    assert app.after_task_finished_hooks == [shop["stop_timer"]]


def test_hooks_stay_functions_and_keep_their_order(app):
    @app.before_task_started
    def first(): ...

    @app.before_task_started
    async def second(): ...

    assert app.before_task_started_hooks == [first, second]
    assert first() is None


def test_a_batch_is_sent_at_its_end_in_one_trip(app, note, broker):
    with app.batch():
        note.delay(1)
        note.delay(2, queue="payments", eta=timedelta(1))
        assert not broker.calls

    assert [(call.queue.name, call.delay) for call in broker.calls] == [
        ("reports", None),
        ("payments", 86400.0),
    ]
    assert broker.trips == ["enqueue_all"]


def test_a_batch_that_raises_sends_nothing_and_ends(app, note, broker):
    def fail():
        with app.batch():
            note.delay(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert not broker.trips
    note.delay(2)
    assert values(broker) == [b"[2]"]


def test_a_call_that_is_refused_spoils_its_batch(app, note, broker):
    def fail():
        with app.batch():
            note.delay(1)
            note.delay(object())

    with pytest.raises(TypeError):
        fail()

    assert not broker.trips


def test_a_batch_in_a_batch_joins_it(app, note, broker):
    with app.batch():
        note.delay(1)
        with app.batch():
            note.delay(2)
        note.delay(3)
        assert not broker.calls

    assert values(broker) == [b"[1]", b"[2]", b"[3]"]
    assert broker.trips == ["enqueue_all"]


def test_an_empty_batch_makes_no_trip(app, broker):
    with app.batch():
        pass

    assert not broker.trips


def test_a_broadcast_does_not_wait_for_its_batch(app, note, broker):
    with app.batch():
        assert note.broadcast(1) == 3
        assert len(broker.broadcasts) == 1


def test_a_batch_keeps_nothing_when_it_has_ended(app, note):
    with app.batch():
        note.delay(1)

    assert app._batch.get() is None


def test_the_broker_is_made_once_and_without_connecting():
    app = make(port=1)

    assert isinstance(app.broker, Broker)
    assert app.broker is app.broker


def test_a_batch_is_of_its_own_thread(app, note, broker):
    with app.batch():
        note.delay("here")
        thread = threading.Thread(target=note.delay, args=("there",))
        thread.start()
        thread.join()
        assert values(broker) == [b'["there"]']

    assert values(broker) == [b'["there"]', b'["here"]']


def test_what_outlives_a_batch_in_its_context_is_sent_at_once(app, note, broker):
    with app.batch():
        context = contextvars.copy_context()
    context.run(note.delay, 1)
    with app.batch():
        context.run(note.delay, 2)
        assert values(broker) == [b"[1]", b"[2]"]


def test_a_call_from_async_code_is_sent_by_the_async_way(note, broker):
    asyncio.run(note.adelay(1, queue="emails"))
    asyncio.run(note.using(eta=timedelta(seconds=5)).adelay(2))

    assert [(call.queue.name, call.delay) for call in broker.calls] == [
        ("emails", None),
        ("reports", 5.0),
    ]
    assert broker.trips == ["aenqueue_all", "aenqueue_all"]


def test_async_calls_join_a_batch_and_are_checked(app, note, broker):
    async def main():
        with app.batch():
            await note.adelay(1)
            assert not broker.calls
        with pytest.raises(TypeError, match=r"note\(\)"):
            await note.adelay()
        with pytest.raises(UnknownQueue):
            await note.adelay(1, queue="nowhere")

    asyncio.run(main())

    assert broker.trips == ["enqueue_all"]


def make(**options):
    return WakaQ(queues=["default"], **options)


def test_a_schedule_may_name_a_task_that_comes_later():
    app = make(schedules=[("@daily", "report", [1]), CronTask("@daily", "report", "default", [2])])

    @app.task
    def report(day): ...

    app.validate()


def test_a_schedule_of_an_unknown_task_is_found_when_all_are_there():
    app = make(schedules=[("@daily", "reprot")])

    @app.task
    def report(): ...

    with pytest.raises(UnknownTask, match=r"reprot.*unknown task; the known ones: report"):
        app.validate()


def test_a_schedule_whose_arguments_do_not_fit_is_found():
    app = make(schedules=[("@daily", "report", [1, 2])])

    @app.task
    def report(day): ...

    with pytest.raises(ConfigError, match=r"CronTask\('@daily', 'report'\): report\(\): too many"):
        app.validate()


def test_a_schedule_or_an_exclusion_with_an_unknown_queue_is_refused_at_import():
    with pytest.raises(UnknownQueue, match="'nowhere'; the known ones: default"):
        make(schedules=[CronTask("@daily", "report", queue="nowhere")])
    with pytest.raises(UnknownQueue, match="'nowhere'"):
        make(exclude_queues=["nowhere"])


def test_a_bad_schedule_is_refused_at_import():
    with pytest.raises(ConfigError, match="61"):
        make(schedules=[("61 * * * *", "report")])


def test_two_apps_do_not_share_anything(app, note):
    other = make()

    assert app.tasks == {"note": note}
    assert not other.tasks
    assert other.settings.prefix == app.settings.prefix


# -- synchronous mode


def test_in_place_a_task_gets_its_arguments_as_a_worker_would(synchronous):
    got = []

    @synchronous.task
    def store(*args, **kwargs):
        got.append((args, kwargs))

    assert store.delay((1, 2), price=Decimal("1.5"), eta=timedelta(days=1)) is None
    assert store.broadcast({3}) == 1

    assert got == [(([1, 2],), {"price": Decimal("1.5")}), (([3],), {})]


def test_in_place_the_arguments_are_checked_as_ever(synchronous):
    @synchronous.task
    def store(value): ...

    with pytest.raises(TypeError, match=r"args\[0\]"):
        store.delay(object())
    with pytest.raises(UnknownQueue):
        store.delay(1, queue="nowhere")
    with pytest.raises(TypeError, match="eta=5"):
        store.delay(1, eta=5)


@pytest.fixture
def order(synchronous):
    """Return what happened in which order, with hooks of both kinds and a wrapper around tasks."""
    order = []

    @synchronous.before_task_started
    def before():
        order.append("before")

    @synchronous.after_task_finished
    async def after():
        await asyncio.sleep(0)
        order.append("after")

    @synchronous.wrap_tasks_with
    async def wrapper(fn, args, kwargs):
        order.append("wrapper")
        result = fn(*args, **kwargs)
        if asyncio.iscoroutine(result):
            await result

    @synchronous.task
    def store(value):
        order.append(value)
        if value == "fail":
            raise KeyError(value)

    @synchronous.task
    async def send(value):
        await asyncio.sleep(0)
        store.function(value)

    return order


@pytest.mark.parametrize("name", ["store", "send"])
@pytest.mark.parametrize("in_loop", [False, True])
def test_in_place_hooks_and_wrapper_run_too_also_within_a_running_loop(
    synchronous, order, name, in_loop
):
    task = synchronous.tasks[name]

    async def main():
        task.delay(1)

    if in_loop:
        asyncio.run(main())
    else:
        task.delay(1)

    assert order == ["before", "wrapper", 1, "after"]


@pytest.mark.parametrize("name", ["store", "send"])
def test_in_place_an_error_comes_out_after_the_hooks(synchronous, order, name):
    with pytest.raises(KeyError, match="fail"):
        synchronous.tasks[name].delay("fail")

    assert order == ["before", "wrapper", "fail", "after"]


@pytest.mark.parametrize("name", ["store", "send"])
def test_in_place_adelay_runs_it_before_it_returns(synchronous, order, name):
    asyncio.run(synchronous.tasks[name].adelay(1))

    assert order == ["before", "wrapper", 1, "after"]


def test_in_place_adelay_runs_an_async_task_on_the_loop_of_its_caller(synchronous):
    loops = []

    @synchronous.task
    async def send():
        loops.append(asyncio.get_running_loop())

    async def main():
        await send.adelay()
        return asyncio.get_running_loop()

    assert asyncio.run(main()) is loops[0]


def test_in_place_a_task_may_call_another_one(synchronous):
    done = []

    @synchronous.wrap_tasks_with
    async def wrapper(fn, args, kwargs):
        inner.function()
        await fn(*args, **kwargs)
        await outer_again.adelay()

    @synchronous.task
    async def outer():
        done.append("outer")

    @synchronous.task
    async def inner_async():
        done.append("inner")

    outer_again = make(synchronous_mode=True).task(inner_async.function)
    inner = make().task(lambda: done.append("hello"))

    outer.delay()

    assert done == ["hello", "outer", "inner"]


def test_a_dropped_async_task_is_an_error_also_in_place(synchronous):
    @synchronous.wrap_tasks_with
    def wrapper(fn, args, kwargs): ...

    @synchronous.task
    async def send(): ...

    with pytest.raises(WakaQError, match="did not run it"):
        send.delay()
