"""The least settings that the example needs, and `WAKAQ`."""

import os

SECRET_KEY = "for this example only"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", "shop.sqlite3"),
    },
}
WAKAQ = {
    "url": os.environ.get("REDIS_URL", "redis://localhost:6379"),
    "queues": [(0, "orders"), (1, "default")],
    "concurrency": 2,
    "soft_timeout": 30,
    "hard_timeout": 60,
}
