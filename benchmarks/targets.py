"""What WakaQ has to reach: ratios to peers and floors of the same run, and figures of its own.

`from_results` judges what the other parts measured; the rest measures WakaQ where peers have no
counterpart.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks import machine
from benchmarks.session import HERE, PEERS, Session
from benchmarks.table import Figures, drain

WAKAQ = PEERS["wakaq"]
Medians = dict[str, Figures]


class Check(NamedTuple):
    """A figure and its limit."""

    what: str
    value: float
    limit: float
    is_minimum: bool = True

    @property
    def is_reached(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


def _at_most(what: str, value: float, limit: float) -> Check:
    return Check(what, value, limit, is_minimum=False)


def from_results(table: Medians, asynchronous: Medians, delayed: Medians) -> Iterator[Check]:
    """Judge what was measured next to the peers."""
    own, blpop, lpop = table["wakaq"], table["floor: BLPOP"], table["floor: LPOP 100"]
    others = [figures for name, figures in table.items() if PEERS[name].is_rival]

    def best(figure: str) -> float:
        return max(figures[figure] for figures in others)

    def leanest(figure: str) -> float:
        return min(figures[figure] for figures in others)

    yield Check("drain / fastest peer", own["drain"] / best("drain"), 20)
    yield Check("drain / LPOP 100", own["drain"] / lpop["drain"], 0.35)
    yield Check("drain, 1 KB / fastest peer", own["drain_1kb"] / best("drain_1kb"), 12)
    for figure in ("worker_cpu", "redis_cpu"):
        yield _at_most(f"{figure} / leanest peer", own[figure] / leanest(figure), 1 / 8)
    yield _at_most("Requests to Redis a task", own["reads"], 0.1)
    yield _at_most("Redis commands a task, with those in scripts", own["commands"], 0.1)
    yield Check("delay() / fastest peer", own["enqueue"] / best("enqueue"), 1.1)
    yield Check("batch() / delay()", own["bulk"] / own["enqueue"], 15)
    yield _at_most("pick-up p50 / BLPOP", own["pick_up_p50"] / blpop["pick_up_p50"], 1.5)
    yield _at_most("pick-up p99 / BLPOP", own["pick_up_p99"] / blpop["pick_up_p99"], 1.7)
    yield _at_most("idle, two workers: PSS of all processes, MB", own["pss"], 50)
    yield Check("async sleeps, share of ideal", asynchronous["wakaq"]["async_share"], 0.95)
    yield _at_most("single delayed, p50 late, ms", delayed["wakaq"]["late_p50"], 20)
    yield _at_most("10,000 due at once, p99 late, ms", delayed["wakaq"]["burst_p99"], 500)


def _alone(session: Session, tasks: int, seconds: float) -> float:
    """Return tasks a second of as many bare loops as there are workers."""
    spec = {"tasks": tasks // session.processes, "seconds": seconds}
    loops = [session.producer("sleep", spec) for _ in range(session.processes)]
    slowest = max(json.loads(loop.communicate()[0])["seconds"] for loop in loops)
    return tasks / slowest


def _share(session: Session, duration: float, span: float) -> float:
    """Return how much of what bare loops do in `span` seconds two workers did."""
    tasks = int(span / duration) * session.processes
    drained = drain(session, tasks, seconds=duration)["drain"]
    return drained / _alone(session, tasks, duration)


def utilisation(scale: float) -> Iterator[Check]:
    """Measure sleeping sync tasks against the same calls in bare loops."""
    for duration, limit in ((0.001, 0.95), (0.01, 0.98), (0.1, 0.985)):
        span = max(2.0, 10 * scale)
        with Session(WAKAQ, int(span / duration) * 2 + 1) as session:
            session.start_workers()
            share = _share(session, duration, span)
        yield Check(f"{duration * 1000:.0f} ms tasks, share of bare loops", share, limit)


def far_away(scale: float) -> Iterator[Check]:
    """Measure with a round trip of 2 ms to Redis."""
    tasks, span = int(200_000 * scale), max(2.0, 10 * scale)
    with Session(WAKAQ, tasks + 1) as session:
        session.port = machine.free_port()
        ports = [str(session.port), str(session.server.port), "0.001"]
        proxy = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.proxy", *ports], cwd=HERE.parent
        )
        try:
            session.start_workers()
            yield Check("2 ms to Redis: drain/s", drain(session, tasks)["drain"], 50_000)
            session.marks.clear()
            share = _share(session, 0.01, span)
            yield Check("2 ms to Redis: 10 ms tasks, share of bare loops", share, 0.95)
        finally:
            proxy.kill()
            proxy.wait()


def many_workers(scale: float) -> Iterator[Check]:
    """Measure 64 busy and 300 idle workers."""
    tasks = max(1_280, int(6_400 * scale))
    with Session(WAKAQ, tasks + 1, processes=64) as session:
        session.start_workers()
        figures = drain(session, tasks, seconds=0.1)
    yield Check("64 workers, 100 ms tasks, share of 640/s", figures["drain"] / 640, 0.97)
    yield _at_most("64 workers: supervisor, share of a core", figures["parent_share"], 0.15)
    with Session(WAKAQ, 1, processes=300) as session:
        session.start_workers()
        supervisor = [session.workers[0].pid]
        machine.wait_until("300 workers", lambda: len(session.pids()) > 300, 60)
        time.sleep(3)
        before, span = machine.cpu(supervisor), max(5.0, 20 * scale)
        time.sleep(span)
        share = (machine.cpu(supervisor) - before) / span
        yield _at_most("300 idle workers: supervisor, share of a core", share, 0.03)
        yield _at_most("300 idle workers: connections (one queue)", session.server.connections(), 6)


def _first(waiting: int, tasks: int) -> float:
    """Return tasks a second of the first so many of those that wait."""
    with Session(WAKAQ, waiting + 1) as session:
        session.start_workers()
        session.pause()
        session.enqueue(waiting, bulk=True)
        started = session.resume()
        ended = session.marks.wait(tasks, 60)
    return tasks / (ended - started)


def _drained(queues: int, tasks: int) -> float:
    with Session(WAKAQ, tasks + 1, queues=queues) as session:
        session.start_workers()
        return drain(session, tasks)["drain"]


def flat_cost(scale: float) -> Iterator[Check]:
    """Measure whether a long queue, or many queues, make a task dearer."""
    waiting, tasks = max(200_000, int(1_000_000 * scale)), int(200_000 * scale)
    rounds = range(3)
    pairs = [(_first(waiting, 20_000), _first(20_000, 20_000)) for _ in rounds]
    ratio = statistics.median(many / few for many, few in pairs)
    yield Check(f"first 20,000 of {waiting:,} waiting / of 20,000", ratio, 0.9)
    ratio = statistics.median(_drained(50, tasks) / _drained(1, tasks) for _ in rounds)
    yield Check("drain with 50 queues / with 1", ratio, 0.8)


def _drained_full(tasks: int, **environment: str) -> float:
    """Return tasks a second of workers that are started on a full queue, once a tenth is done."""
    with Session(WAKAQ, tasks) as session:
        session.enqueue(tasks, bulk=True)
        session.spawn(**environment)
        machine.wait_until("a tenth is done", lambda: session.marks.done() > tasks // 10, 60)
        done, begin = session.marks.done(), time.monotonic()
        session.marks.wait(tasks, 300)
        return (tasks - done) / (time.monotonic() - begin)


def mixed(scale: float) -> Iterator[Check]:
    """Measure what it costs sync tasks that the app has an async one."""
    tasks = int(300_000 * scale)
    pairs = [(_drained_full(tasks, BENCH_ALSO_ASYNC="1"), _drained_full(tasks)) for _ in range(3)]
    ratio = statistics.median(mixed / pure for mixed, pure in pairs)
    yield Check("drain of sync tasks, with an async def registered / without", ratio, 0.85)


def fleet(scale: float) -> Iterator[Check]:
    """Measure many idle supervisors on one queue, to which a task comes now and then."""
    count, tasks, every = 50, max(100, int(400 * scale)), 0.05
    with Session(WAKAQ, tasks + 1, processes=1) as session:
        for _ in range(count):
            session.spawn()
        machine.wait_until("all are idle", lambda: session.server.blocked() >= count, 240)
        time.sleep(5)
        turns, cpu, begin = session.server.scripts(), session.server.cpu(), time.monotonic()
        session.enqueue(tasks, every=every)
        session.marks.wait(tasks, 60)
        seconds = time.monotonic() - begin
        made = session.server.scripts() - turns
        # Besides a turn, each makes a script call a second to promote, and one each three seconds
        # to beat.
        idle = count * seconds * (1 + 1 + 1 / 3)
        busy = (session.server.cpu() - cpu) / seconds
    yield _at_most(f"{count} idle supervisors: turns a task", (made - idle) / tasks, 3)
    yield _at_most(f"{count} idle supervisors, 20 tasks/s: Redis, share of a core", busy, 0.05)


def imports(_scale: float) -> Iterator[Check]:
    """Measure `import wakaq` against `import redis`, and see what it brings along."""
    clock = (
        "import sys, time; t = time.perf_counter(); import {};"
        " print(time.perf_counter() - t, *sys.modules)"
    )

    def run(module: str) -> list[str]:
        code = [str(WAKAQ.python), "-c", clock.format(module)]
        return subprocess.check_output(code, text=True, cwd="/").split()

    WAKAQ.install()
    pairs = [(float(run("wakaq")[0]), float(run("redis")[0])) for _ in range(15)]
    ratio = statistics.median(own for own, _ in pairs) / statistics.median(
        bare for _, bare in pairs
    )
    yield _at_most("import wakaq / import redis", ratio, 1.3)
    needless = {"psutil", "croniter", "multiprocessing"}.intersection(run("wakaq"))
    yield _at_most(f"needless modules of a producer {' '.join(needless)}", len(needless), 0)


PARTS: dict[str, Callable[[float], Iterator[Check]]] = {
    part.__name__: part
    for part in (utilisation, far_away, many_workers, flat_cost, mixed, fleet, imports)
}
