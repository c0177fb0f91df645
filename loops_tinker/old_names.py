"""The modules of `tinker` that scripts import from, and which of ours each is."""

from __future__ import annotations

import logging
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Final

from . import errors, futures, rest, sampling, service, training, types

__all__ = ["modules", "names", "tell_of_other"]

INTERFACES: Final = {
    "api_future": futures,
    "rest_client": rest,
    "sampling_client": sampling,
    "service_client": service,
    "training_client": training,
}
"""The modules of ``tinker.lib.public_interfaces``; the names of all of them are also in the package itself."""

GROUPS: Final = ("optimizer", "optim_step_request")
"""The modules of ``tinker.types`` that are not called as a type in them, in the new and in the old generation."""

log: logging.Logger = logging.getLogger("loops_tinker")


def names() -> dict[str, object]:
    """Return what ``tinker`` itself has."""
    package = sys.modules[__name__.partition(".")[0]]
    return {name: getattr(package, name) for name in (*package.__all__, "__all__")}


def modules() -> dict[str, ModuleType]:
    """Return our modules by the names under which scripts import them."""
    interfaces = _package("tinker.lib.public_interfaces", INTERFACES)
    for module in INTERFACES.values():
        vars(interfaces).update({name: getattr(module, name) for name in module.__all__})
    lib = _package("tinker.lib", {"public_interfaces": interfaces, "retry_handler": sampling})
    found: dict[str, ModuleType] = {
        "tinker.types": types,
        "tinker.lib": lib,
        "tinker.lib.public_interfaces": interfaces,
        "tinker.lib.retry_handler": sampling,
        "tinker._exceptions": errors,
    }
    found.update({f"tinker.types.{_snake(name)}": types for name in (*types.__all__, *GROUPS)})
    found.update({f"tinker.lib.public_interfaces.{name}": module for name, module in INTERFACES.items()})
    return found


def tell_of_other() -> None:
    """Say that another `tinker` is installed, which this one hides."""
    try:
        other = version("tinker")
    except PackageNotFoundError:
        return
    log.warning("`import tinker` is loops_tinker here, and not the installed tinker %s", other)


def _package(name: str, members: dict[str, ModuleType]) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = []
    vars(package).update(members)
    return package


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
