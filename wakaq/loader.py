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

APP_VARIABLE = "WAKAQ_APP"  # in the environment of the fork server


def load(path: str) -> WakaQ:
    """Import `package.module.variable`, or `package.module:variable`, from the current folder or an installed package.

    Raises:
        ConfigError: There is no such application, or its import fails.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module_name, _, variable = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not variable:
        raise ConfigError(
            f"--app={path!r}: write package.module.variable, such as shop.tasks.wakaq"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failed(path, error) from error
        parent, _, last = str(error.name).rpartition(".")
        places = sys.modules[parent].__path__ if parent else [here]
        hint = suggest(last, [module.name for module in pkgutil.iter_modules(places)])
        raise ConfigError(
            f"--app={path!r}: no module named {error.name!r} in {here} or installed{hint}"
        ) from error
    # Broad: it is the application's code, which may raise anything; what it was is said in one line.
    except Exception as error:
        raise _import_failed(path, error) from error
    found = getattr(module, variable, None)
    if isinstance(found, WakaQ):
        found.validate()
        return found
    apps = [name for name, value in vars(module).items() if isinstance(value, WakaQ)]
    remedy = suggest(variable, apps, 0.0) or "; the module has no WakaQ(...)"
    kind = type(found).__name__
    what = "there is no such variable" if found is None else f"it is no WakaQ but a {kind}"
    raise ConfigError(f"--app={path!r}: {what}{remedy}")


def suggest(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """Return the end of an error message with the likely name, empty if none is as near as `least` says."""
    near = difflib.get_close_matches(name, known, 1, least)
    return f"; did you mean {near[0]!r}?" if near else ""


def _import_failed(path: str, error: Exception) -> ConfigError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ConfigError(f"--app={path!r}: its import fails{where}: {type(error).__name__}: {error}")
