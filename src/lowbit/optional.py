"""The one place that imports an optional dependency, and says what to install when it is missing."""

from importlib import import_module
from types import ModuleType

from lowbit.errors import InputError


def require(module: str, extra: str) -> ModuleType:
    """The imported module, such as "datasets", which lowbit's extra of the given name installs.

    Raises InputError with the command that installs it. A module that is there but broken raises its own error.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
    raise InputError(f'this needs the package {module.partition(".")[0]}: pip install "lowbit[{extra}]"')
