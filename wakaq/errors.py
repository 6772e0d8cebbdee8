"""Every error of WakaQ's own. Not for redis-py's: those pass through untouched."""


class WakaQError(Exception):
    """The base of all errors that WakaQ raises by itself."""


class ConfigError(WakaQError, ValueError):
    """The application's setup is wrong; raised at import."""


class UnknownTask(WakaQError, LookupError):
    """No task of this name is registered."""


class UnknownQueue(WakaQError, LookupError):
    """The application has no queue of this name."""


class NotAMessage(WakaQError, ValueError):
    """A payload cannot be read as a call of a task."""


class SoftTimeout(BaseException):
    """Raised in a task that ran past its soft timeout.

    It derives from `BaseException`, as `asyncio.CancelledError` does, so that a task's
    `except Exception` lets it pass.
    """
