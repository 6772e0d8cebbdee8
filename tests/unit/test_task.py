import functools
import inspect
from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from wakaq import ConfigError, Queue, UnknownQueue, WakaQ


@pytest.fixture
def charge(app):
    @app.task(queue="payments")
    def charge(order: int, cents: int = 5, *, currency: str = "EUR") -> tuple[int, int, str]:
        """Charge a card."""
        return order, cents, currency

    return charge


def sent(broker):
    """Return the only call that was sent."""
    (call,) = broker.calls
    return call.queue.name, call.payload.decode(), call.delay, call.at


def test_a_task_is_called_like_its_function(charge):
    assert charge(1, currency="USD") == (1, 5, "USD")


def test_a_task_looks_like_its_function(charge, app):
    assert (charge.name, charge.__name__, charge.__doc__) == ("charge", "charge", "Charge a card.")
    assert charge.__module__ == __name__
    assert list(inspect.signature(charge).parameters) == ["order", "cents", "currency"]
    assert app.tasks == {"charge": charge}
    assert charge.queue is app.queues_by_name["payments"]
    assert not charge.is_async


def test_an_async_def_makes_an_async_task(app):
    @app.task
    async def send(): ...

    assert send.is_async
    assert send.queue is None


def test_attributes_of_a_function_do_not_become_options(app):
    def report(): ...

    report.queue, report.name, report.max_retries = "nonsense", "other", -1

    task = app.task(report)

    assert (task.name, task.queue, task.max_retries) == ("report", None, None)


def test_delay_sends_to_the_tasks_queue_in_one_trip(charge, broker):
    charge.delay(1, cents=2)

    assert sent(broker) == (
        "payments",
        '{"name": "charge", "args": [1], "kwargs": {"cents": 2}}',
        None,
        None,
    )
    assert broker.trips == ["enqueue"]


def test_a_task_without_a_queue_goes_to_the_default_one(app, broker):
    @app.task
    def report(): ...

    report.delay()

    assert sent(broker)[0] == "reports"


def test_a_queue_may_be_named_or_given(charge, broker, app):
    charge.delay(1, queue="emails")
    charge.delay(1, queue=app.queues_by_name["emails"])
    charge.using(queue="emails").delay(1)
    charge.using("emails").delay(1)

    assert [call.queue.name for call in broker.calls] == ["emails"] * 4
    assert {call.payload for call in broker.calls} == {
        b'{"name": "charge", "args": [1], "kwargs": {}}'
    }


@pytest.mark.parametrize("queue", ["nowhere", "", Queue("nowhere")])
def test_an_unknown_queue_is_refused_with_the_known_ones(charge, broker, queue):
    with pytest.raises(UnknownQueue, match=r"unknown queue .*payments, emails, reports"):
        charge.delay(1, queue=queue)

    assert not broker.calls


@pytest.mark.parametrize(
    ("eta", "delay", "at"),
    [
        (timedelta(minutes=1), 60.0, None),
        (timedelta(milliseconds=5), 0.005, None),
        (timedelta(0), None, None),
        (timedelta(days=-1), None, None),
        (datetime(2100, 1, 1), None, 4102444800.0),  # noqa: DTZ001 - naive is UTC
        (datetime(2100, 1, 1, tzinfo=UTC), None, 4102444800.0),
        (datetime(2100, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), None, 4102444800.0),
    ],
)
def test_an_eta_is_relative_or_absolute(charge, broker, eta, delay, at):
    charge.delay(1, eta=eta)
    charge.using(eta=eta).delay(1)

    assert [(call.delay, call.at) for call in broker.calls] == [(delay, at)] * 2


@pytest.mark.parametrize("eta", [5, "tomorrow", date(2100, 1, 1), True])
def test_any_other_eta_is_refused_with_its_value(charge, broker, eta):
    with pytest.raises(TypeError, match=r"eta=.*timedelta"):
        charge.delay(1, eta=eta)

    assert not broker.calls


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1, 2, 3), {}),
        ((1,), {"order": 1}),
        ((), {"order": 1, "amount": 2}),
        ((), {"cents": 1}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_the_call(charge, broker, args, kwargs):
    for send in (charge.delay, charge.using(queue="emails").delay, charge.broadcast):
        with pytest.raises(TypeError, match=r"^charge\(\): "):
            send(*args, **kwargs)

    assert not broker.calls
    assert not broker.broadcasts


def test_what_fitted_before_does_not_hide_what_does_not(charge, broker):
    for _ in range(3):
        charge.delay(1, cents=2)
        charge.delay(cents=2, order=1)
        with pytest.raises(TypeError, match="amount"):
            charge.delay(1, amount=2)
        with pytest.raises(TypeError, match="multiple values"):
            charge.delay(1, 2, cents=2)

    assert len(broker.calls) == 6


def test_a_task_that_takes_any_names_keeps_few_of_them(app, broker):
    @app.task
    def note(**values): ...

    for number in range(2_000):
        note.delay(**{f"name{number}": 1})

    assert len(broker.calls) == 2_000
    assert len(note._shapes) == 1_000


def test_a_required_keyword_argument_is_missed(app):
    @app.task
    def report(*names, day): ...

    report.delay("a", "b", day=1)
    with pytest.raises(TypeError, match="'day'"):
        report.delay("a", "b")


def test_what_counts_is_what_the_call_accepts_not_what_a_decorator_hides(app, broker):
    def with_session(function):
        @functools.wraps(function)
        def inner(*args):
            return function("session", *args)

        return inner

    @app.task
    @with_session
    def store(session, value): ...

    store.delay(7)

    assert len(broker.calls) == 1


def test_arguments_that_cannot_be_sent_are_refused_by_name(charge, broker):
    with pytest.raises(TypeError, match=r'kwargs\["cents"\] is a object'):
        charge.delay(1, cents=object())
    with pytest.raises(ValueError, match=r"args\[0\] is nan"):
        charge.delay(float("nan"))

    assert not broker.calls


def test_a_broadcast_says_whom_it_reached(charge, broker):
    assert charge.broadcast(1) == 3
    assert broker.broadcasts == [b'{"name": "charge", "args": [1], "kwargs": {}}']


@pytest.mark.parametrize("options", [{"queue": "emails"}, {"eta": timedelta(1)}])
def test_a_broadcast_has_no_queue_and_no_eta(charge, broker, options):
    with pytest.raises(TypeError, match="unexpected keyword"):
        charge.broadcast(1, **options)

    assert not broker.broadcasts


def generator():
    yield 1


async def async_generator():
    yield 1


def has_queue(queue): ...


def has_eta(*, eta=None): ...


class Klass: ...


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (generator, "'generator' is a generator"),
        (async_generator, "'async_generator' is a generator"),
        (has_queue, r"'has_queue': parameters named \['queue'\]"),
        (has_eta, r"'has_eta': parameters named \['eta'\]"),
        (Klass, "only a function"),
        (functools.partial(print), "only a function"),
        ("name", "only a function"),
    ],
)
def test_what_cannot_be_a_task_is_refused_at_import(app, function, names):
    with pytest.raises(ConfigError, match=names):
        app.task(function)

    assert not app.tasks


def test_two_tasks_of_one_name_are_refused(app):
    def report(): ...

    app.task(report)
    with pytest.raises(ConfigError, match="two tasks are named 'report'"):
        app.task(report)


def test_a_task_on_an_unknown_queue_is_refused_at_import(app):
    with pytest.raises(UnknownQueue, match="'nowhere'"):
        app.task(queue="nowhere")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"soft_timeout": -1}, "task 'report': soft_timeout=-1"),
        (
            {"soft_timeout": 5, "hard_timeout": 5},
            "task 'report' on queue 'reports': hard_timeout=5",
        ),
        ({"max_retries": -1}, "task 'report': max_retries=-1"),
        ({"retry_on": [ValueError]}, "task 'report': retry_on="),
        ({"retry_delay": -1}, "task 'report': retry_delay=-1"),
    ],
)
def test_a_bad_option_is_refused_with_the_name_of_the_task(app, options, names):
    with pytest.raises(ConfigError, match=names):

        @app.task(**options)
        def report(): ...


def test_an_unknown_option_is_refused(app):
    with pytest.raises(TypeError, match="hard_timout"):

        @app.task(hard_timout=5)
        def report(): ...


def test_timeouts_are_compared_after_precedence():
    app = WakaQ(queues=[Queue("fast", hard_timeout=10), "slow"], hard_timeout=60)

    with pytest.raises(
        ConfigError, match=r"task 'report' on queue 'slow': hard_timeout=60 .*soft_timeout=60"
    ):

        @app.task(soft_timeout=60)
        def report(): ...

    with pytest.raises(
        ConfigError, match=r"task 'report' on queue 'fast': hard_timeout=10 .*soft_timeout=30"
    ):

        @app.task(soft_timeout=30, queue="fast")
        def report(): ...

    @app.task(soft_timeout=30)
    def report(): ...

    with pytest.raises(ConfigError, match="task 'report' on queue 'fast'"):
        report.delay(queue="fast")
