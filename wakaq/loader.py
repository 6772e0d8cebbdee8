"""Finds the application that a command names. Not for running it."""

import difflib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from wakaq.app import WakaQ
from wakaq.errors import ConfigError


def load(path: str) -> WakaQ:
    """Import `package.module.variable`, or `package.module:variable`.

    The package is in the current folder, or installed.

    Raises:
        ConfigError: There is no such application, or its import fails.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module_name, _, variable = path.replace(":", ".").rpartition(".")
    if not module_name or not variable:
        raise ConfigError(f"--app={path!r}: write package.module.variable, such as shop.wakaq")
    try:
        module = importlib.import_module(module_name)
    # Broad: it is the application's code, which may raise anything; one line says what it was.
    except Exception as error:
        raise ConfigError(f"--app={path!r}: {_why(error, module_name)}") from error
    app = getattr(module, variable, None)
    if not isinstance(app, WakaQ):
        kind = type(app).__name__
        what = "there is no such variable" if app is None else f"it is no WakaQ but a {kind}"
        apps = [name for name, value in vars(module).items() if isinstance(value, WakaQ)]
        remedy = suggest(variable, apps, 0.0) or "; the module has no WakaQ(...)"
        raise ConfigError(f"--app={path!r}: {what}{remedy}")
    app.validate()
    return app


def suggest(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """Return the end of an error message that suggests the likely name.

    Args:
        name: What was given.
        known: What there is.
        least: How near a name has to be, from 0 to 1; if none is, the result is empty.
    """
    near = difflib.get_close_matches(name, known, 1, least)
    return f"; did you mean {near[0]!r}?" if near else ""


def _why(error: Exception, module_name: str) -> str:
    """Return why the import of a module failed: it is not there, or its code raised."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module_name}.".startswith(f"{missing}."):
        parent, _, last = missing.rpartition(".")
        places = getattr(sys.modules[parent], "__path__", []) if parent else sys.path[:1]
        hint = suggest(last, [module.name for module in pkgutil.iter_modules(places)])
        return f"no module named {missing!r} in {Path.cwd()} or installed{hint}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"its import fails{where}: {type(error).__name__}: {error}"
