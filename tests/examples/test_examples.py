"""The examples of the documentation, each with its framework, a real worker and a real server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def load_example(load_app):
    return lambda name: load_app((EXAMPLES / f"{name}.py").read_text(), name=name)


@pytest.fixture
def outbox(tmp_path, monkeypatch):
    path = tmp_path / "outbox"
    path.touch()
    monkeypatch.setenv("OUTBOX", str(path))
    return path


def test_the_script_counts_words(start, load_example, tmp_path, app_url, eventually):
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "b.txt").write_text("")
    worker = start(load_example("script"))
    subprocess.run(
        [sys.executable, "script.py", "a.txt", "b.txt"],
        cwd=tmp_path,
        env=os.environ | {"REDIS_URL": app_url},
        check=True,
    )

    def both_are_counted() -> None:
        assert (tmp_path / "a.txt.count").read_text() == "3\n"
        assert (tmp_path / "b.txt.count").read_text() == "0\n"

    eventually(both_are_counted, within=10)
    assert worker.stop() == 0


def test_flask_tasks_run_in_the_context_of_the_app(start, load_example, outbox, eventually):
    pytest.importorskip("flask", reason="needs the dependency group `examples`")
    shop = load_example("flask_shop")
    worker = start(shop)
    response = shop.app.test_client().post("/users/Ann")

    assert (response.status_code, response.get_json()) == (202, {"registered": "Ann"})
    eventually(lambda: outbox.read_text() == "Welcome, Ann!\n", within=10)
    assert worker.stop() == 0


def test_fastapi_enqueues_from_its_event_loop(start, load_example, outbox, eventually):
    pytest.importorskip("fastapi", reason="needs the dependency group `examples`")
    testclient = pytest.importorskip("fastapi.testclient")
    shop = load_example("fastapi_shop")
    worker = start(shop)
    with testclient.TestClient(shop.app) as client:
        response = client.post("/users/Ann")

    assert (response.status_code, response.json()) == (202, {"registered": "Ann"})
    # In either order: a worker that takes longer than the delay to start finds both due.
    expected = {"Welcome, Ann!", "Ann, are you still there?"}
    eventually(lambda: set(outbox.read_text().splitlines()) == expected, within=10)
    assert worker.stop() == 0


ORDERS = """
import json, django
django.setup()
from django.test import Client
from shop.models import Order
client = Client()
client.post("/buy/never?fail=1")
answer = client.post("/buy/lamp")
print(json.dumps([answer.status_code, answer.json()["order"]]))
"""
CONFIRMED = """
import django
django.setup()
from shop.models import Order
print(list(Order.objects.values_list("item", "is_confirmed")))
"""


def test_django_enqueues_on_commit(  # noqa: PLR0913, PLR0917 - all fixtures
    start, redis, tmp_path, app_url, monkeypatch, eventually
):
    pytest.importorskip("django", reason="needs the dependency group `examples`")
    monkeypatch.setenv("DATABASE", str(tmp_path / "shop.sqlite3"))
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    shutil.copytree(EXAMPLES / "django", tmp_path, dirs_exist_ok=True)
    environment = os.environ | {"REDIS_URL": app_url}

    def python(*arguments: str) -> str:
        # In a process of its own, since Django is set up once in a process and for good.
        command = [sys.executable, *arguments]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    python("manage.py", "migrate", "--run-syncdb")
    assert json.loads(python("-c", ORDERS)) == [202, 1]
    assert redis.llen("wakaq:orders") == 1  # not the order that was rolled back

    worker = start(ModuleType("shop.worker"))  # not imported here, either
    eventually(lambda: python("-c", CONFIRMED) == "[('lamp', True)]\n", within=10)
    assert worker.stop() == 0
