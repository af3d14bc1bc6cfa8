"""The one place that imports an optional dependency, and says what to install when it is missing."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
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


def late(module: str) -> ModuleType:
    """A module of lowbit that imports an optional package at its top; ask `installed` for that package first."""
    return import_module(module)


@cache
def installed(module: str) -> bool:
    """Whether `require(module)` would find it."""
    parent = module.rpartition(".")[0]
    return (not parent or installed(parent)) and find_spec(module) is not None
