"""Finds the application that a command names. Not for running it."""

import difflib
import importlib
import sys
import traceback
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
        raise ConfigError(
            f"--app={path!r}: no module named {error.name!r} in {here} or installed"
        ) from error
    # Broad: it is the application's code, which may raise anything; what it was is said in one line.
    except Exception as error:
        raise _import_failed(path, error) from error
    found = getattr(module, variable, None)
    if isinstance(found, WakaQ):
        found.validate()
        return found
    apps = [name for name, value in vars(module).items() if isinstance(value, WakaQ)]
    near = difflib.get_close_matches(variable, apps, 1, 0.0)
    remedy = f"did you mean {module_name}.{near[0]}?" if near else "the module has no WakaQ(...)"
    what = (
        "there is no such variable"
        if found is None
        else f"it is no WakaQ but {type(found).__name__}"
    )
    raise ConfigError(f"--app={path!r}: {what}; {remedy}")


def _import_failed(path: str, error: Exception) -> ConfigError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ConfigError(f"--app={path!r}: its import fails{where}: {type(error).__name__}: {error}")
