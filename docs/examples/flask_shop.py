"""Flask: tasks run in the application's context.

flask --app flask_shop run              the web application
wakaq-worker --app=flask_shop.wakaq     its workers
"""

import functools
import os
from pathlib import Path

from flask import Flask, current_app

from wakaq import WakaQ

app = Flask(__name__)
app.config["OUTBOX"] = os.environ.get("OUTBOX", "outbox.txt")

wakaq = WakaQ(
    queues=[(0, "mail"), (1, "default")],
    url=os.environ.get("REDIS_URL", "redis://localhost:6379"),
    concurrency=2,
)


@wakaq.wrap_tasks_with
def in_app_context(fn):
    @functools.wraps(fn)
    def run(*args, **kwargs):
        with app.app_context():
            return fn(*args, **kwargs)

    return run


@wakaq.task(queue="mail", max_retries=3, soft_timeout=30)
def welcome(name: str) -> None:
    with Path(current_app.config["OUTBOX"]).open("a") as outbox:
        outbox.write(f"Welcome, {name}!\n")


@app.post("/users/<name>")
def register(name: str):
    welcome.delay(name)
    return {"registered": name}, 202
