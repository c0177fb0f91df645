"""One complete program: provision, train, publish, sample, save and download, as careful users write it."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct, field

import loops_async as loops
from tests.support.colours import Colour

from .ledger import Operation, Prompt

T = TypeVar("T")

TRIES = 20
WAIT_AGAIN_SECONDS = 0.2
SAMPLES_AT_ONCE = 64
FEW_TOKENS = loops.SamplingParams(max_tokens=4, temperature=0.0)


class Size(Struct, frozen=True):
    """How much a program does."""

    steps: int = 50
    samples: int = 500


class Report(Struct):
    """What a program saw.

    Attributes:
        results: what each call returned, by its name; equal in every run, disturbed or not.
        given_up: calls that ended in an error that says not to repeat them, by the error's type.
        lost: operations whose outcome no wait gives, though the service knows it.
        untyped: errors that a caller could not expect.
        named: the text of every error, where ids of what may be left must stand.
        run_id: the run that it trained.
        is_complete: whether it reached its end.
    """

    operations: int = 0
    results: dict[str, Any] = field(default_factory=dict)
    given_up: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    untyped: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    run_id: str = ""
    is_complete: bool = False


class GivenUpError(Exception):
    """The program cannot go on: an error said not to repeat a call that it needs."""


class Program:
    """A program with the clients of one colour."""

    def __init__(self, colour: Colour, *, base_url: str, api_key: str, model: str, size: Size, directory: Path) -> None:
        self._colour = colour
        self._base_url = base_url
        self._api_key = api_key
        self._model = model
        self._size = size
        self._directory = directory
        self.report = Report()

    async def run(self) -> Report:
        """Run it to its end, or to the first error that forbids to go on."""
        try:
            async with AsyncExitStack() as stack:
                await self._work(await self._connect(stack))
            self.report.is_complete = True
        except GivenUpError:
            pass
        except Exception as error:
            self._note_untyped("leaving the client", error)
        return self.report

    async def _connect(self, stack: AsyncExitStack) -> loops.ServiceClient:
        async def connect() -> loops.ServiceClient:
            client = self._colour.connected(base_url=self._base_url, api_key=self._api_key, on_exit="leave")
            return await stack.enter_async_context(client)

        return await self._needed("open", connect)

    async def _work(self, service: loops.ServiceClient) -> None:
        trainer = await self._needed(
            "create", lambda: service.create_lora_training_client(self._model, rank=4, seed=1), fresh_tries=3
        )
        self.report.run_id = trainer.run_id
        for step in range(self._size.steps):
            await self._train(trainer, step)
        sampler = await self._needed("publish", lambda: trainer.save_weights_and_get_sampling_client("policy"))
        await self._sample(sampler)
        saving = await self._needed("save", lambda: trainer.save_state("final"))
        await self._outcome("save", saving)
        await self._download(service, trainer)

    async def _train(self, trainer: loops.TrainingClient, step: int) -> None:
        (_, first), (_, rate) = operations(step)
        tokens = [int(first), 20, 30]
        datum = loops.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": [20, 30, 40]})
        params = loops.AdamParams(learning_rate=rate)
        forward = await self._needed("forward_backward", lambda: trainer.forward_backward([datum]))
        update = await self._needed("optim_step", lambda: trainer.optim_step(params))
        self.report.results[f"forward_backward {step}"] = (await self._outcome("forward_backward", forward)).loss
        self.report.results[f"optim_step {step}"] = (await self._outcome("optim_step", update)).metrics["step"]

    async def _sample(self, sampler: loops.SamplingClient) -> None:
        at_once = asyncio.Semaphore(SAMPLES_AT_ONCE)

        async def sample(number: int) -> None:
            async with at_once:
                answer = await self._call("sample", lambda: sampler.sample(list(prompt(number)), 1, FEW_TOKENS))
            if answer is not None:
                (sequence,) = answer.sequences
                self.report.results[f"sample {number}"] = (sequence.tokens, sequence.logprobs)

        await asyncio.gather(*map(sample, range(self._size.samples)))

    async def _download(self, service: loops.ServiceClient, trainer: loops.TrainingClient) -> None:
        checkpoints = await self._needed("list checkpoints", lambda: trainer.list_checkpoints())
        (saved,) = [one for one in checkpoints if one.checkpoint_id == "final"]
        await self._needed("download", lambda: service.download_checkpoint(saved.id, dest_dir=self._directory))
        files = sorted(path for path in self._directory.rglob("*"))
        self.report.results["files"] = [path.name for path in files]
        weights = (self._directory / "adapter_model.safetensors").read_bytes()
        self.report.results["weights"] = hashlib.sha256(weights).hexdigest()

    async def _needed(self, what: str, call: Callable[[], Awaitable[T]], *, fresh_tries: int = 1) -> T:
        """Call; the program cannot go on without the result.

        `fresh_tries` is how often the user decides to call again although the error says that it may be paid twice.
        """
        for _ in range(fresh_tries):
            result = await self._call(what, call)
            if result is not None:
                return result
        raise GivenUpError

    async def _call(self, what: str, call: Callable[[], Awaitable[T]]) -> T | None:
        """Call, and obey: repeat the call while its errors say that this is right. None when it was given up."""
        self.report.operations += 1
        for _ in range(TRIES):
            try:
                return await call()
            except loops.LoopsError as error:
                self.report.named.append(str(error))
                # What is unfinished goes on under the same keys when the same call is made again.
                if not error.retryable and error.unfinished is None:
                    self.report.given_up[f"{what}: {type(error).__name__}"] += 1
                    return None
            except Exception as error:
                self._note_untyped(what, error)
                return None
        self.report.given_up[f"{what}: {TRIES} tries"] += 1
        return None

    async def _outcome(self, what: str, future: Awaitable[T]) -> T:
        """Wait for an operation, again if the wait failed and the operation did not."""
        for _ in range(TRIES):
            try:
                return await future
            except (loops.RemoteOpError, loops.UnknownRequestError) as error:
                self.report.named.append(str(error))
                self.report.given_up[f"outcome of {what}: {type(error).__name__}"] += 1
                raise GivenUpError from None
            except loops.LoopsError as error:
                self.report.named.append(str(error))
                await asyncio.sleep(WAIT_AGAIN_SECONDS)
            except Exception as error:
                self._note_untyped(f"outcome of {what}", error)
                raise GivenUpError from None
        self.report.lost.append(f"the outcome of {what} cannot be waited for again: {self.report.named[-1][:300]}")
        raise GivenUpError

    def _note_untyped(self, what: str, error: Exception) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        self.report.untyped.append(f"{what}: {type(error).__name__}: {str(error)[:200]} ({place})")


def operations(step: int) -> tuple[Operation, Operation]:
    """Return the two operations of a step as the ledger notes them; no other step has the same."""
    return ("forward_backward", step + 1), ("optim_step", (step + 1) * 1e-4)


def prompt(number: int) -> Prompt:
    """Return the prompt of a sample; no other sample of the program has the same."""
    return 1, 2 + number // 100, 2 + number % 100
