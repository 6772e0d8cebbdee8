"""Delayed tasks by real workers: when they start, in which order, how often, and what they cost."""

import json
import statistics
from datetime import UTC, date, datetime, timedelta

import pytest

APP = """
import json, os, time
from wakaq import WakaQ

wakaq = WakaQ(queues=["high", "low"], url=os.environ["REDIS_URL"], concurrency=CONCURRENCY)

@wakaq.task
def note(name, **ignored):
    wakaq.broker.client.rpush("done", json.dumps([name, time.time()]))
"""
SINGLE, PAIR = (APP.replace("CONCURRENCY", str(count)) for count in (1, 2))


def seconds(count):
    return timedelta(seconds=count)


def results(redis, count, within=15):
    """Wait for `count` tasks; return pairs of a name and the unix time of its start, in order."""
    found = []
    for _ in range(count):
        element = redis.blpop("done", timeout=within)
        assert element, f"only {len(found)} of {count} ran"
        found.append(json.loads(element[1]))
    return found


def assert_nothing_waits(redis):
    assert redis.keys("wakaq:eta:*") == redis.keys("wakaq:inflight:*") == []
    assert redis.llen("wakaq:high") == redis.llen("wakaq:low") == 0


def memory(processes):
    """Return the proportional set size of processes together, in bytes."""
    return sum(process.memory_full_info().pss for process in processes)


def test_every_form_of_an_eta_is_kept(start, redis):
    worker = start(PAIR)
    worker.workers(2)
    note, now = worker.app.note, datetime.now(UTC)
    note.delay("delta", eta=seconds(1.2))
    note.using(eta=seconds(1.2)).delay("using")
    note.using(queue="high", eta=now + seconds(1.2)).delay("aware")
    note.delay("naive", eta=now.replace(tzinfo=None) + seconds(1.2))
    note.delay("now")

    (first, *others) = results(redis, 5)
    assert first[0] == "now"
    assert {name for name, _ in others} == {"delta", "using", "aware", "naive"}
    for _, started in others:
        assert 0 <= started - now.timestamp() - 1.2 < 0.5
    assert worker.stop() == 0
    assert_nothing_waits(redis)


def test_an_eta_in_the_past_runs_now(start, redis):
    worker = start(SINGLE)
    worker.app.note.delay("delta", eta=seconds(-5))
    worker.app.note.delay("zero", eta=timedelta())
    worker.app.note.delay("date", eta=datetime(2020, 1, 1, tzinfo=UTC))

    assert {name for name, _ in results(redis, 3)} == {"delta", "zero", "date"}
    assert worker.stop() == 0


@pytest.mark.parametrize("eta", ["tomorrow", 5, date(2030, 1, 1), datetime])
def test_something_else_than_a_moment_or_a_delta_is_refused_and_nothing_is_sent(
    load_app, redis, eta
):
    note = load_app(SINGLE).note

    with pytest.raises(TypeError, match="give a datetime"):
        note.delay("x", eta=eta)
    with pytest.raises(TypeError, match="give a datetime"):
        note.using(eta=eta).delay("x")
    assert redis.keys("*") == []


def test_the_same_call_pending_twice_runs_once_and_a_throw_away_argument_tells_them_apart(
    start, redis, load_app
):
    app = load_app(SINGLE)
    for _ in range(2):
        app.note.delay("same", eta=seconds(0.5))
    for number in range(2):
        app.note.delay("other", number=number, eta=seconds(0.5))
    worker = start(app)

    assert sorted(name for name, _ in results(redis, 3)) == ["other", "other", "same"]
    assert worker.stop() == 0
    assert redis.llen("done") == 0
    assert_nothing_waits(redis)


def test_the_oldest_run_first_and_before_what_waits_already(start, redis, load_app):
    app = load_app(SINGLE)
    now = datetime.now(UTC)
    app.note.delay("waits")
    for age in (1, 3, 2):
        app.note.delay(f"{age} old", eta=now - seconds(age))
    redis.lpush("wakaq:low", b'{"name": "block", "args": [], "kwargs": {}}')
    source = SINGLE + (
        "\n@wakaq.task\ndef block():\n"
        "    while wakaq.broker.client.zcard('wakaq:eta:low'): time.sleep(0.01)\n"
    )
    worker = start(source)

    names = [name for name, _ in results(redis, 4)]
    assert names == ["3 old", "2 old", "1 old", "waits"]
    assert worker.stop() == 0


def test_a_task_delayed_while_no_worker_ran_starts_with_the_next_one(start, redis, load_app):
    app = load_app(SINGLE)
    app.note.delay("late", eta=seconds(0.01))
    redis.time()
    worker = start(app)

    assert [name for name, _ in results(redis, 1)] == ["late"]
    assert worker.stop() == 0


def test_a_delayed_task_starts_close_to_its_time(start, redis):
    worker = start(SINGLE)
    worker.workers()
    due = {}
    for number in range(20):
        moment = datetime.now(UTC) + seconds(1 + 0.05 * number)
        due[number] = moment.timestamp()
        worker.app.note.delay(number, eta=moment)

    late = [started - due[name] for name, started in results(redis, 20)]
    assert min(late) >= 0
    # A quiet machine takes 2 ms; see the benchmarks.
    assert statistics.median(late) < 0.05
    assert worker.stop() == 0


def test_many_due_at_one_instant_all_run_once_with_two_supervisors(start, redis):
    workers = [start(SINGLE)]
    workers.append(start(workers[0].app))
    for worker in workers:
        worker.workers()
    due = datetime.now(UTC) + seconds(2)
    with workers[0].app.wakaq.batch():
        for number in range(10_000):
            workers[0].app.note.delay(number, eta=due)

    ran = results(redis, 10_000)
    # How late they start is the benchmarks' part: it depends on what else the machine does.
    assert min(started for _, started in ran) >= due.timestamp()
    assert sorted(name for name, _ in ran) == list(range(10_000))
    assert [worker.stop() for worker in workers] == [0, 0]
    assert redis.llen("done") == 0
    assert_nothing_waits(redis)


def memory_growth(start, redis, eventually, count):
    """Return by how many bytes a worker and its supervisor grow with so many delayed tasks."""
    worker = start(SINGLE)
    worker.workers()
    worker.app.note.delay("warm", eta=seconds(0.1))
    results(redis, 1)
    before = memory(worker.processes())
    due = datetime.now(UTC) + timedelta(hours=1)
    for page in range(count // 10_000):
        with worker.app.wakaq.batch():
            for number in range(10_000):
                worker.app.note.delay(page * 10_000 + number, eta=due)
    assert redis.zcard("wakaq:eta:low") == count
    passes = redis.info("commandstats")["cmdstat_zrangebyscore"]["calls"]
    eventually(
        lambda: redis.info("commandstats")["cmdstat_zrangebyscore"]["calls"] > passes + 2,
        within=15,
    )
    worker.app.note.delay("still served")
    results(redis, 1)
    growth = memory(worker.processes()) - before
    assert worker.stop() == 0
    return growth


def test_delayed_tasks_cost_a_worker_no_memory(start, redis, eventually):
    assert memory_growth(start, redis, eventually, 30_000) < 5_000_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_million_delayed_tasks_cost_a_worker_no_memory(start, redis, eventually):
    assert memory_growth(start, redis, eventually, 1_000_000) < 5_000_000
