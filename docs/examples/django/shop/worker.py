"""What `wakaq-worker --app=shop.worker.wakaq` imports: it sets Django up, then finds all tasks."""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
django.setup()

from shop import tasks  # noqa: E402, F401 - only after setup(); one import for each application with tasks
from shop.background import wakaq  # noqa: E402, F401
