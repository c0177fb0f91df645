"""Continuous batching: one thread that, in each step, admits new requests and generates one token for all rows.

The conventions are those of vLLM's completions: the token that ends a completion (an end token of the model, or one of
the stop tokens) is one of its tokens but not part of its text; the text ends before a stop string, but the tokens
include it; special tokens have no text.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from ..base import SampleJob, SampleOutcome
from . import cores
from .adapter_batch import AdapterBatch
from .kv_cache import KvCache
from .lora import using
from .models import Base
from .picking import pick
from .request import Request, Row

__all__ = ["TorchSampler"]

MAX_ROWS = 64
"""The largest number of completions generated at once."""

MAX_CACHE_BYTES = 2 * 1024**3
"""The memory of the KV cache; a single completion may exceed it."""

GROUP_ROWS = 16
"""The largest number of samples of one request that start together, to share the prefill of their prompt."""

PREFILL_TOKENS = 2048
"""The prompt positions, with padding, of one prefill between two decoding steps; a longer prompt is prefilled alone."""

HEAD_POSITIONS = 512
"""The number of prompt positions whose logits are in memory at once."""

_Inbox: TypeAlias = "queue.SimpleQueue[Request | None]"

_log = logging.getLogger(__name__)


class TorchSampler:
    """Generates samples with any adapters of one base model, many requests at a time."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._inbox: _Inbox = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=_Loop(base, self._inbox).run, name="loops-sampler", daemon=True)
        self._thread.start()

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        """Check `job` (raises `RefusedError`) and queue it. Cancelling the future removes it from the batch."""
        request = Request.of(job, self._base)
        with self._lock:
            if self._closed:
                raise RuntimeError("the sampler is closed")
            self._inbox.put(request)
        return request.future

    def close(self) -> None:
        """Stop the thread and cancel the pending futures."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()


class _Loop:
    """The state of the thread. Row i of `_rows` is in slot i of the KV cache."""

    def __init__(self, base: Base, inbox: _Inbox) -> None:
        self._base = base
        self._inbox = inbox
        self._closing = False
        self._waiting: deque[Request] = deque()
        self._clear()

    def run(self) -> None:
        while self._receive(wait=True):
            with cores.working(), torch.inference_mode():
                while (self._waiting or self._rows) and self._receive(wait=False):
                    cores.adjust()
                    self._step()
        for request in {*self._waiting, *(row.request for row in self._rows)}:
            request.future.cancel()

    def _receive(self, *, wait: bool) -> bool:
        """Receive the new requests, with `wait` at least one; return False once the sampler is closed."""
        while not self._closing:
            try:
                request = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if request is None:
                self._closing = True
            else:
                self._waiting.append(request)
            wait = False
        return not self._closing

    def _step(self) -> None:
        self._remove_done()
        if groups := self._admit():
            with _failing_together({group[0].request for group in groups}):
                self._prefill(groups)
        if self._rows:
            with _failing_together({row.request for row in self._rows}):
                self._decode()
        if not self._rows:
            self._clear()

    def _clear(self) -> None:
        """Release the memory that only running sequences need."""
        self._rows: list[Row] = []
        self._kv_cache = KvCache()
        self._prefilling, self._decoding = AdapterBatch(), AdapterBatch()

    def _remove_done(self) -> None:
        """Remove requests that were cancelled or have failed."""
        self._waiting = deque(request for request in self._waiting if not request.future.done())
        self._release([slot for slot, row in enumerate(self._rows) if row.request.future.done()])

    def _release(self, slots: Sequence[int]) -> None:
        for slot in reversed(slots):
            self._kv_cache.remove(slot)
            self._rows[slot] = self._rows[-1]
            self._rows.pop()

    def _admit(self) -> list[list[Row]]:
        """Start samples in order of arrival, as many as fit; each group shares a prompt."""
        groups: list[list[Row]] = []
        rows = len(self._rows)
        longest = max((row.request.longest for row in self._rows), default=0)
        widest = 0
        while self._waiting:
            request = self._waiting[0]
            longest = max(longest, request.longest)
            widest = max(widest, len(request.prompt))
            limit = max(1, min(MAX_ROWS, MAX_CACHE_BYTES // (self._base.cache_bytes * longest)))
            count = min(request.num_samples - request.started, GROUP_ROWS, limit)
            if rows + count > limit or (groups and (len(groups) + 1) * widest > PREFILL_TOKENS):
                break
            groups.append(request.start(count))
            rows += count
            if request.started == request.num_samples:
                self._waiting.popleft()
        return groups

    def _prefill(self, groups: list[list[Row]]) -> None:
        """Process the prompts, and generate each row's first token."""
        requests = [group[0].request for group in groups]
        lengths = [len(request.prompt) for request in requests]
        # Padding on the right needs no mask, since causal attention uses no position to the right.
        tokens = torch.zeros(len(groups), max(lengths), dtype=torch.int64)
        for row, request in zip(tokens, requests, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        cache = DynamicCache()
        with using(self._prefilling.combine([request.adapter for request in requests])):
            hidden = self._base.hidden(tokens, cache)
        for states, request in zip(hidden, requests, strict=True):
            if request.wanted_prompt_logprobs is not None and request.prompt_logprobs is None:
                request.prompt_logprobs = self._prompt_logprobs(states, request.prompt, request.wanted_prompt_logprobs)
        last = self._logprobs(hidden[torch.arange(len(groups)), torch.tensor(lengths) - 1])
        row_of = [i for i, group in enumerate(groups) for _ in group]
        starting = [row for group in groups for row in group]
        ended = self._extend(starting, last[row_of])
        for row, i, has_ended in zip(starting, row_of, ended, strict=True):
            if not has_ended:
                self._kv_cache.add(cache, i, lengths[i])
                self._rows.append(row)

    def _decode(self) -> None:
        """Generate one more token for every row."""
        tokens = torch.tensor([row.tokens[-1:] for row in self._rows])
        with using(self._decoding.combine([row.request.adapter for row in self._rows])):
            hidden = self._base.hidden(tokens, **self._kv_cache.next())
        ended = self._extend(self._rows, self._logprobs(hidden[:, -1]))
        self._release([slot for slot, has_ended in enumerate(ended) if has_ended])

    def _extend(self, rows: Sequence[Row], logprobs: Tensor) -> list[bool]:
        """Add a token to each row by its own sampling parameters; return which rows have ended."""
        tokens = pick(logprobs, [row.request.params for row in rows], [row.random.random() for row in rows])
        own = logprobs[torch.arange(len(rows)), tokens].tolist()
        return [
            row.accept(token, logprob, self._base.tokenizer)
            for row, token, logprob in zip(rows, tokens, own, strict=True)
        ]

    def _logprobs(self, states: Tensor) -> Tensor:
        return self._base.logits(states).log_softmax(-1)

    def _prompt_logprobs(self, states: Tensor, prompt: list[int], top_k: int) -> list[dict[int, float] | None]:
        """Return the logprobs of each prompt token, from the position before it; the first token has none."""
        found: list[dict[int, float] | None] = [None]
        for part, targets in zip(
            states[: len(prompt) - 1].split(HEAD_POSITIONS), torch.tensor(prompt[1:]).split(HEAD_POSITIONS), strict=True
        ):
            logprobs = self._logprobs(part)
            own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
            best = logprobs.topk(top_k)
            for row in zip(targets.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True):
                token, logprob, top_ids, top_logprobs = row
                found.append({token: logprob} | dict(zip(top_ids, top_logprobs, strict=True)))
        return found


@contextmanager
def _failing_together(requests: Collection[Request]) -> Iterator[None]:
    """Let these requests fail with an error that is raised inside the block; the thread continues."""
    try:
        yield
    except Exception as error:
        _log.exception("sampling failed for %d requests", len(requests))
        for request in requests:
            request.fail(error)
