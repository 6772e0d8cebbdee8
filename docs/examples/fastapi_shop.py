"""FastAPI: endpoints enqueue without blocking the event loop, and tasks are async.

uvicorn fastapi_shop:app                the web application
wakaq-worker --app=fastapi_shop.wakaq   its workers
"""

import asyncio
import os
from datetime import timedelta
from pathlib import Path

from fastapi import FastAPI

from wakaq import WakaQ

app = FastAPI()

wakaq = WakaQ(
    queues=[(0, "mail"), (1, "default")],
    url=os.environ.get("REDIS_URL", "redis://localhost:6379"),
    concurrency=2,
    async_concurrency=100,
)


def write(line: str) -> None:
    with Path(os.environ.get("OUTBOX", "outbox.txt")).open("a") as outbox:
        outbox.write(f"{line}\n")


@wakaq.task(queue="mail", soft_timeout=30)
async def welcome(name: str) -> None:
    await asyncio.to_thread(write, f"Welcome, {name}!")


@wakaq.task
def remind(name: str) -> None:
    write(f"{name}, are you still there?")


@app.post("/users/{name}", status_code=202)
async def register(name: str) -> dict[str, str]:
    await welcome.adelay(name)
    await remind.adelay(name, eta=timedelta(seconds=1))
    return {"registered": name}
