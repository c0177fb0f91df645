"""Names that other clients have for what is here: a program that was moved is told ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

__all__ = ["KnowsOtherNames"]

OTHER_NAMES: Final = {
    "aclose": "close",
    "create_rest_client": "control_plane",
    "get_checkpoint_archive_url": "get_checkpoint_files",
    "get_training_run": "get_run",
    "list_training_runs": "list_runs",
    "list_user_checkpoints": "list_all_checkpoints",
    "model_dump": "to_dict",
    "model_dump_json": "to_json",
    "model_id": "run_id",
    "model_validate": "from_dict",
    "save_weights_external": "download_checkpoint",
}
"""Other clients' names, and ours. A name that ends in ``_async`` needs no entry: here it has no such end."""

_NO_FUTURE: Final = "this is the result itself, not a future of it"
_STARTED: Final = "`start` of loops_sync or loops_async returns a future that has it"
_KEPT: Final = "the service deletes a checkpoint only when its time is over: give ttl_seconds when you save it"
_PICKLED: Final = "pickle the client instead: that holds no API key"

EXPLAINED: Final = {
    "coroutine": _STARTED,
    "create_custom_loss": "forward_backward_custom takes the function itself",
    "delete_checkpoint": _KEPT,
    "delete_checkpoint_from_tinker_path": _KEPT,
    "from_sampler_handle": _PICKLED,
    "future": _STARTED,
    "get_sampler_handle": _PICKLED,
    "model_copy": "use msgspec.structs.replace",
    "result": _NO_FUTURE,
    "set_checkpoint_ttl_from_tinker_path": _KEPT,
}
"""Other clients' names of what has no name here, and what to do instead."""


class KnowsOtherNames:
    """The `AttributeError` of a missing name says what it is called here."""

    __slots__ = ()

    if not TYPE_CHECKING:  # a type checker would believe that every name exists

        def __getattr__(self, name: str) -> Any:
            kind = type(self)
            raise AttributeError(
                f"{kind.__name__!r} object has no attribute {name!r}{_hint(kind, name)}", name=name, obj=self
            )


def _hint(kind: type, name: str) -> str:
    plain = name.removesuffix("_async")
    ours = OTHER_NAMES.get(plain, plain)
    if ours != name and hasattr(kind, ours):
        return f"; here it is {ours!r}"
    return f"; {EXPLAINED[plain]}" if plain in EXPLAINED else ""
