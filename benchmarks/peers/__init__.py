"""One small module a queue.

Each runs in a virtual environment of its own, with this folder's parent on its path.

A module has `COMMANDS` (the worker's command lines), `KEYS` (what is empty in Redis when all work
is done) and `send(args, eta)`, plain or async; `BULK`, `SCHEDULERS` where it has them. None imports
the driver.
"""
