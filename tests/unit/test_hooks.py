import asyncio
import functools
import inspect
import warnings

import pytest

from wakaq import ConfigError, SoftTimeout, WakaQError
from wakaq.hooks import arun_between, complete, run_between


@pytest.fixture
def done():
    return []


@pytest.fixture
def store(app, done):
    @app.task
    def store(value, key="k"):
        done.append((key, value))
        return value

    return store


@pytest.fixture
def send(app, done):
    @app.task
    async def send(value, key="k"):
        await asyncio.sleep(0)
        done.append((key, value))
        return value

    return send


def run(app, task, *args, **kwargs):
    """Call a task as a worker does."""
    result = app.callable_for(task)(*args, **kwargs)
    return asyncio.run(awaited(result)) if task.is_async else result


async def awaited(result):
    return await result


def test_without_a_wrapper_it_is_the_function_itself(app, store, send):
    assert app.callable_for(store) is store.function
    assert app.callable_for(send) is send.function


def wrapper_forms(seen):
    """Return wrappers for both kinds of tasks, in each documented form, that note what they see."""

    def decorator(fn):
        async def run_async(*args, **kwargs):
            seen.append("before")
            result = await fn(*args, **kwargs)
            seen.append("after")
            return result

        def run_sync(*args, **kwargs):
            seen.append("before")
            result = fn(*args, **kwargs)
            seen.append("after")
            return result

        return run_async if inspect.iscoroutinefunction(fn) else run_sync

    async def async_call(fn, args, kwargs):
        seen.append("before")
        result = fn(*args, **kwargs)
        if inspect.iscoroutinefunction(fn):
            result = await result
        seen.append("after")
        return result

    def call(fn, args, kwargs):
        if inspect.iscoroutinefunction(fn):
            return async_call(fn, args, kwargs)
        seen.append("before")
        result = fn(*args, **kwargs)
        seen.append("after")
        return result

    return [decorator, async_call, call]


@pytest.mark.parametrize("form", [0, 1, 2], ids=["decorator", "async call", "call"])
@pytest.mark.parametrize("kind", ["store", "send"])
def test_a_task_runs_between_the_two_halves_of_its_wrapper(app, done, request, form, kind):
    task = request.getfixturevalue(kind)
    app.wrap_tasks_with(wrapper_forms(done)[form])

    assert run(app, task, 1, key="x") == 1
    assert done == ["before", ("x", 1), "after"]


def test_an_async_wrapper_of_a_sync_task_may_really_wait(app, store, done):
    @app.wrap_tasks_with
    async def wrapper(fn, args, kwargs):
        await asyncio.sleep(0)
        fn(*args, **kwargs)

    run(app, store, 1)

    assert done == [("k", 1)]


def test_a_plain_decorator_that_returns_the_awaitable_is_enough(app, send, done):
    @app.wrap_tasks_with
    def wrapper(fn):
        def inner(*args, **kwargs):
            done.append("before")
            return fn(*args, **kwargs)

        return inner

    assert run(app, send, 1) == 1
    assert done == ["before", ("k", 1)]


def drops_in_decorator(fn):
    def inner(*args, **kwargs):
        fn(*args, **kwargs)

    return inner


def drops_in_call(fn, args, kwargs):
    fn(*args, **kwargs)


async def drops_in_async_call(fn, args, kwargs):
    fn(*args, **kwargs)


def never_calls(fn, args, kwargs): ...


@pytest.mark.parametrize(
    "wrapper", [drops_in_decorator, drops_in_call, drops_in_async_call, never_calls]
)
def test_a_wrapper_that_drops_an_async_task_is_an_error_that_says_how_to_write_it(
    app, send, done, wrapper
):
    app.wrap_tasks_with(wrapper)

    with warnings.catch_warnings():
        # Python itself warns of the coroutine that was dropped.
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(WakaQError, match=r"'send' did not run it: .*return fn\("):
            run(app, send, 1)

    assert not done


def test_two_async_tasks_at_once_are_told_apart(app, done):
    @app.wrap_tasks_with
    async def wrapper(fn, args, kwargs):
        if args[0] == "run":
            await asyncio.gather(fn(*args, **kwargs))

    @app.task
    async def send(what):
        await asyncio.sleep(0)
        done.append(what)

    async def both():
        call = app.callable_for(send)
        return await asyncio.gather(call("run"), call("skip"), call("run"), return_exceptions=True)

    results = asyncio.run(both())

    assert [type(result) for result in results] == [type(None), WakaQError, type(None)]
    assert done == ["run", "run"]


def test_what_a_task_or_a_wrapper_raises_comes_out(app, send, store):
    @app.wrap_tasks_with
    def wrapper(fn, args, kwargs):
        if args == ("wrapper",):
            raise KeyError("wrapper")
        return fn(*args, **kwargs)

    @app.task
    async def fail():
        raise ValueError("task")

    with pytest.raises(KeyError, match="wrapper"):
        run(app, store, "wrapper")
    with pytest.raises(KeyError, match="wrapper"):
        run(app, send, "wrapper")
    with pytest.raises(ValueError, match="task"):
        run(app, fail)


def test_a_sync_decorator_around_an_async_def_still_runs_it(app, done):
    def plain(function):
        @functools.wraps(function)
        def inner(*args):
            return function(*args)

        return inner

    @app.task
    @plain
    async def send(value):
        done.append(value)

    run(app, send, 1)

    assert done == [1]


def test_the_wrapped_function_keeps_its_name(app, store, send):
    names = []

    @app.wrap_tasks_with
    def wrapper(fn):
        names.append(fn.__name__)
        return fn

    assert app.callable_for(store).__name__ == "store"
    assert app.callable_for(send).__name__ == "send"
    assert names == ["store", "send"]


def test_a_wrapper_wraps_each_task_once_and_also_those_looked_up_before(app, store):
    wrapped = []
    app.callable_for(store)

    @app.wrap_tasks_with
    def wrapper(fn):
        wrapped.append(fn)
        return fn

    app.callable_for(store)(1)
    app.callable_for(store)(2)

    assert wrapped == [store.function]


@pytest.mark.parametrize(
    "wrapper",
    [lambda: 1, lambda a, b: (a, b), lambda a, b, c, d: (a, b, c, d), lambda *, fn: fn, 5, None],
)
def test_a_wrapper_of_another_form_is_refused_at_import(app, wrapper):
    with pytest.raises(ConfigError, match="wrap_tasks_with"):
        app.wrap_tasks_with(wrapper)


def test_an_async_decorator_is_refused_at_import(app):
    async def wrapper(fn): ...

    with pytest.raises(ConfigError, match="write it as a plain def"):
        app.wrap_tasks_with(wrapper)


@pytest.mark.parametrize("kind", ["store", "send"])
def test_a_decorator_that_returns_no_function_is_an_error(app, request, kind):
    task = request.getfixturevalue(kind)
    app.wrap_tasks_with(lambda _: None)

    with pytest.raises(WakaQError, match=f"'{kind}' is None: return a function"):
        app.callable_for(task)


def test_a_second_wrapper_is_refused(app):
    assert app.wrap_tasks_with(drops_in_call) is drops_in_call

    with pytest.raises(ConfigError, match="join them"):
        app.wrap_tasks_with(drops_in_decorator)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda fn, _label="x": fn,
        lambda fn, *_: fn,
        lambda fn, args, kwargs=None: fn(*args, **kwargs),
        lambda fn, args=(), kwargs=None: fn(*args, **kwargs),
    ],
)
def test_the_form_is_told_by_the_parameters(app, store, done, wrapper):
    app.wrap_tasks_with(wrapper)
    run(app, store, 1)

    assert done == [("k", 1)]


# -- the sequence of hooks -------------------------------------------------------------------------

RAISED = [ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError, SoftTimeout]


def say(said, *words, error=None):
    """Return functions that say their word; if it is the first one's, they then raise the error."""

    def make(word):
        def function():
            said.append(word)
            if error and word == words[0]:
                raise error

        return function

    return [make(word) for word in words]


def between(kind, before, call, after):
    """Run a sync or an async task between its hooks."""
    if kind == "sync":
        return run_between(before, call, after, complete)

    async def acall():
        await asyncio.sleep(0)
        call()

    return asyncio.run(arun_between(before, acall, after))


def made_async(functions):
    """Return async functions that do the same."""

    def make(function):
        async def run():
            await asyncio.sleep(0)
            function()

        return run

    return [make(function) for function in functions]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_task_runs_between_its_hooks(kind):
    said = []
    error = between(kind, say(said, "b1", "b2"), *say(said, "task"), say(said, "a1", "a2"))

    assert error is None
    assert said == ["b1", "b2", "task", "a1", "a2"]


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("hooks", ["sync hooks", "async hooks"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_that_fails_before_a_task_is_the_tasks_failure(kind, hooks, raised):
    said, error = [], raised("no luck")
    before, after = say(said, "b1", "b2", error=error), say(said, "a1", "a2")
    if hooks == "async hooks":
        before, after = made_async(before), made_async(after)

    assert type(between(kind, before, *say(said, "task"), after)) is raised
    assert said == ["b1", "a1", "a2"]


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_a_task_raises_is_returned_after_the_hooks(kind, raised):
    said, error = [], raised("no luck")
    (call,) = say(said, "task", error=error)

    assert between(kind, say(said, "b1"), call, say(said, "a1")) is error
    assert said == ["b1", "task", "a1"]


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("hooks", ["sync hooks", "async hooks"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_that_fails_after_a_task_is_logged_and_changes_nothing(kind, hooks, raised, caplog):
    said, failure = [], KeyError("the task's")
    after = say(said, "a1", "a2", error=raised("no luck"))
    if hooks == "async hooks":
        after = made_async(after)

    assert between(kind, [], *say(said, "task"), after) is None
    assert between(kind, [], *say(said, "task", error=failure), after) is failure

    assert said == ["task", "a1", "a2"] * 2
    assert caplog.messages == [f"after_task_finished hook {after[0]} failed"] * 2
    assert [record.exc_info[0] for record in caplog.records] == [raised] * 2


def test_a_sync_tasks_hooks_are_completed_by_the_function_given():
    completed = []
    hooks = [lambda: "result of a hook"]

    assert run_between(hooks, lambda: "result of the task", hooks, completed.append) is None
    assert completed == ["result of a hook"] * 2


def test_an_async_task_that_cancels_itself_and_returns_has_returned(caplog):
    said = []

    async def cancels_itself():
        asyncio.current_task().cancel()

    error = asyncio.run(arun_between([], cancels_itself, made_async(say(said, "a1", "a2"))))

    assert error is None
    assert said == ["a2"]
    assert len(caplog.messages) == 1


HOW = {
    "delay": lambda task: task.delay(),
    "broadcast": lambda task: task.broadcast(),
    "adelay": lambda task: asyncio.run(task.adelay()),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("raised", RAISED)
def test_in_place_the_sequence_is_the_same(synchronous, kind, how, raised, caplog):
    said = []
    failing, fine, after_failing, after_fine = (
        *say(said, "b1", "b2", error=raised("no luck")),
        *say(said, "a1", "a2", error=KeyError("a bug")),
    )
    synchronous.before_task_started(failing)
    synchronous.before_task_started(fine)
    synchronous.after_task_finished(after_failing)
    synchronous.after_task_finished(after_fine)

    def store(): ...

    async def send(): ...

    task = synchronous.task({"sync": store, "async": send}[kind])

    with pytest.raises(raised) as caught:
        HOW[how](task)

    assert caught.type is raised
    assert said == ["b1", "a1", "a2"]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_in_place_a_wrapper_that_is_no_function_fails_its_task_between_the_hooks(synchronous, kind):
    said = []
    for hook in say(said, "before"):
        synchronous.before_task_started(hook)
    for hook in say(said, "after"):
        synchronous.after_task_finished(hook)
    synchronous.wrap_tasks_with(lambda _: None)

    def store(): ...

    async def send(): ...

    task = synchronous.task({"sync": store, "async": send}[kind])

    with pytest.raises(WakaQError, match="is None: return a function"):
        task.delay()
    assert said == ["before", "after"]
