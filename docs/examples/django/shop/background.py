"""The application's queues, for tasks and for whoever enqueues.

python manage.py runserver              the web application
wakaq-worker --app=shop.worker.wakaq    its workers
"""

import functools

from django.conf import settings
from django.db import close_old_connections

from wakaq import WakaQ

wakaq = WakaQ(**settings.WAKAQ)


@wakaq.wrap_tasks_with
def with_fresh_connections(fn):
    """Do around a task what Django does around a request.

    A connection that the database dropped is not used.
    """

    @functools.wraps(fn)
    def run(*args, **kwargs):
        close_old_connections()
        try:
            return fn(*args, **kwargs)
        finally:
            close_old_connections()

    return run
