"""Starting calls without waiting: the blocking form of `loops_async.start`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast, overload

from loops_async import CallFuture, InputError
from loops_async._futures import copied, resolved

from ._bridge import Bridge, Held, Items, Relay
from ._future import OperationFuture
from ._handle import Handle, Opened
from ._wakeups import wakeups

__all__ = ["start"]

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E")


@overload
def start(call: Callable[P, OperationFuture[T]], /, *args: P.args, **kwargs: P.kwargs) -> CallFuture[T]: ...
@overload
def start(call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> CallFuture[T]: ...
def start(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> CallFuture[Any]:
    """Start a call without waiting for anything, not even for the service to accept it; from any thread.

    Calls run in the order in which a thread starts or makes them, so operations take their turns in that order.
    Arguments are checked, and data encoded, in the thread that makes all calls of this package: an error of either is
    the future's. Lists that are arguments are copied, so that they may be changed at once; the values in them may not.

    Args:
        call: a method of a `ServiceClient`, a `TrainingClient` or another object of this package that waits, e.g.
            ``trainer.forward_backward``; not one that returns an iterator or a context.
        args: its arguments, without a callback, since no thread waits in which it could be called.
        kwargs: its arguments by name.

    Returns:
        The future of the method's result. For an operation it is that of the operation's own result: what
        ``trainer.forward_backward(...).result()`` would return.

    Raises:
        InputError: `call` is not such a method, or there is a callback.
        ClosedError: this is a forked child of the process in which the object was created, or the thread that makes
            all calls of this package.

    Example:
        ::

            step = loops.start(trainer.forward_backward, data, "cross_entropy")
            sampler = loops.start(trainer.save_weights_and_get_sampling_client, "step-1")
            print(step.result().loss, sampler.result().sample(prompt))
    """
    handle, function = getattr(call, "__self__", None), getattr(call, "__func__", None)
    if not isinstance(handle, Handle) or function is None:
        raise InputError("call", f"must be a method of an object of loops_sync, e.g. trainer.forward; got {call!r}")
    if isinstance(handle, Opened) and function.__name__ == "close":
        raise InputError("call", "close ends all calls, also those that are started: call it when they have ended")
    bridge = handle._bridge  # pyright: ignore[reportPrivateUsage] - private to users of handles
    loop = bridge.loop
    starting = Starting(bridge, function.__name__)
    copies = {name: copied(value) for name, value in kwargs.items()}
    made = function(handle._behind(starting), *map(copied, args), **copies)  # pyright: ignore[reportPrivateUsage] - as above
    if starting.kept is None:
        raise starting.refusal("waits for nothing")
    call_and_wait = resolved(starting.kept)
    # The future of an operation is waited for, so what comes is its result, which is no object with a twin.
    wrap: Callable[..., Any] | None = None if isinstance(made, OperationFuture) else getattr(made, "_of", None)

    async def wrapped() -> Any:
        value = await call_and_wait()
        return value if wrap is None else wrap(value, handle)

    return StartedCall(bridge, loop, wrapped, name=function.__name__)


class StartedCall(CallFuture[T]):
    """A future whose `result`, in a function of a rollout, is interrupted when that is cancelled, as all calls are."""

    def __init__(
        self,
        bridge: Bridge,
        loop: asyncio.AbstractEventLoop,
        call: Callable[[], Coroutine[Any, Any, T]],
        *,
        name: str,
    ) -> None:
        super().__init__(loop, call, name=name)
        self._bridge = bridge

    def result(self, timeout: float | None = None) -> T:
        """Wait in this thread, and return the result; see `CallFuture.result`."""
        if self._bridge.worker is not None:
            return self._bridge.run(self.result_async, timeout)
        return super().result(timeout)

    def _call_soon(self, loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
        wakeups.call_soon(loop, function)


class Starting(Bridge):
    """Stands for a bridge in one call of a method, and keeps what that would run; what it returns means nothing."""

    def __init__(self, bridge: Bridge, name: str) -> None:
        super().__init__()
        self.workers = bridge.workers
        self.kept: Callable[[], Coroutine[Any, Any, Any]] | None = None
        self._name = name

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.kept = partial(function, *args, **kwargs)
        return cast("T", None)

    def relay(self, callback: Callable[[E], object] | None) -> Relay[E]:
        if callback is not None:
            raise self.refusal("has a callback, and no thread waits in which it could be called")
        return StartingRelay(self, None)

    def iterate(self, function: Any, /, *args: Any, **kwargs: Any) -> Items[Any]:
        raise self.refusal("returns an iterator, which waits at each step")

    def advance(self, step: Any) -> Any:
        raise self.refusal("is a step of an iterator")

    def hold(self, function: Any, /, *args: Any, **kwargs: Any) -> Held[Any]:
        raise self.refusal("returns a context, which waits when it is entered")

    def refusal(self, problem: str) -> InputError:
        return InputError("call", f"{self._name} {problem}, so it cannot be started")


class StartingRelay(Relay[E]):
    """A relay without a callback, which keeps the call, too."""

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._bridge.run(function, *args, **kwargs)

    def hold(self, function: Any, /, *args: Any, **kwargs: Any) -> Held[Any]:
        return self._bridge.hold(function, *args, **kwargs)
