"""Continuous batching: one thread that, in each step, admits new requests and generates one token for all rows.

The conventions are those of vLLM's completions: the token that ends a completion (an end token of the model, or one of
the stop tokens) is one of its tokens but not part of its text; the text ends before a stop string, but the tokens
include it; special tokens have no text.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..base import SampleJob, SampleOutcome, SamplerUsage
from . import cores
from .adapter_batch import AdapterBatch
from .kv_cache import KvCache, Prefill, Prefix, capacity
from .lora import using
from .models import Base
from .picking import pick
from .prefix_cache import PrefixCache
from .request import Request, Row

__all__ = ["TorchSampler"]

MAX_ROWS = 64
"""The largest number of completions generated at once."""

MAX_CACHE_BYTES = 2 * 1024**3
"""The memory of the KV cache of the completions under way; a single completion may exceed it."""

MAX_PREFIX_BYTES = 512 * 1024**2
"""The memory of the prompts that are kept for later requests."""

SHARED_POSITIONS = 256
"""The positions of the KV cache that rows must save by sharing their prompt; otherwise each has a copy.

A shared prompt is one more product in each layer and step.
"""

PREFILL_TOKENS = 2048
"""The prompt positions, with padding, that are computed together between two decoding steps."""

CHUNK = 512
"""The positions of one pass of a prompt that is longer than `PREFILL_TOKENS`. New requests start between two passes."""

CHUNK_BESIDE, STEPS_BESIDE = 64, 4
"""The same while completions are under way, and after how many of their steps: a tenth of the time with 64 of them."""

HEAD_POSITIONS = 512
"""The number of prompt positions whose logits are in memory at once."""

_Inbox: TypeAlias = "queue.SimpleQueue[Request | None]"

_log = logging.getLogger("loops_local.sampling")


class TorchSampler:
    """Generates samples with any adapters of one base model, many requests at a time."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._inbox: _Inbox = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = _Loop(base, self._inbox)
        self._thread = threading.Thread(target=self._loop.run, name="loops-sampler", daemon=True)
        self._thread.start()

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        """Check `job` (raises `RefusedError`) and queue it. Cancelling the future removes it from the batch."""
        request = Request.of(job, self._base)
        with self._lock:
            if self._closed:
                raise RuntimeError("the sampler is closed")
            self._inbox.put(request)
        return request.future

    @property
    def usage(self) -> SamplerUsage:
        """What the sampler holds and has done; may be read from any thread."""
        return self._loop.usage

    def close(self) -> None:
        """Stop the thread and cancel the pending futures."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()


class _Loop:
    """The state of the thread. Completions start in the order of arrival, and those put back are first."""

    def __init__(self, base: Base, inbox: _Inbox) -> None:
        self._base = base
        self._inbox = inbox
        self._closing = False
        self._arrivals = 0
        self._waiting: deque[Request] = deque()
        self._put_back: list[Row] = []
        self._contexts: dict[Hashable, _Context] = {}
        self._steps_beside = 0
        self._prefixes = PrefixCache()
        self.usage = SamplerUsage()
        self._clear()

    def run(self) -> None:
        while self._receive(wait=True):
            with cores.working(), torch.inference_mode():
                while self._has_work and self._receive(wait=False):
                    cores.adjust()
                    self._step()
        starting = [row for context in self._contexts.values() for row in context.rows]
        for request in {*self._waiting, *(row.request for row in (*self._put_back, *starting, *self._rows))}:
            request.future.cancel()

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._put_back or self._contexts or self._rows)

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
                self._arrivals += 1
                request.arrival = self._arrivals
                self._waiting.append(request)
            wait = False
        return not self._closing

    def _step(self) -> None:
        self._remove_done()
        self._admit()
        has_others = bool(self._rows) or not all(context.is_long for context in self._contexts.values())
        self._steps_beside = self._steps_beside + 1 if has_others else 0
        for contexts in _prefills([*self._contexts.values()], with_long=self._steps_beside % STEPS_BESIDE == 0):
            with _failing_together({row.request for context in contexts for row in context.rows}):
                self._prefill(contexts, CHUNK_BESIDE if has_others else CHUNK)
        whole = [context for context in self._contexts.values() if context.lacking == 0]
        with _failing_together({row.request for context in whole for row in context.rows}):
            self._start(whole)
        if self._rows:
            with _failing_together({row.request for row in self._rows}):
                self._decode()
        if not self._rows:
            self._clear()
        self._count()

    def _clear(self) -> None:
        """Release the memory that only running sequences need."""
        self._rows: list[Row] = []
        self._kv_cache: KvCache[Row] = KvCache()
        self._prefilling, self._decoding = AdapterBatch(self._base), AdapterBatch(self._base)

    def _positions(self) -> int:
        """Return the positions that the next step needs memory for, and those of prompts that are being computed."""
        return self._kv_cache.positions() + sum(one.positions(len(one.rows)) for one in self._contexts.values())

    def _count(self, *, prefilled: int = 0, reused: int = 0, put_back: int = 0) -> None:
        self.usage = SamplerUsage(
            running=len(self._rows),
            waiting=len(self._put_back)
            + sum(len(context.rows) for context in self._contexts.values())
            + sum(request.num_samples - request.started for request in self._waiting),
            cache_bytes=self._positions() * self._base.cache_bytes,
            prefix_bytes=self._prefixes.nbytes,
            prefilled=self.usage.prefilled + prefilled,
            reused=self.usage.reused + reused,
            put_back=self.usage.put_back + put_back,
        )

    def _remove_done(self) -> None:
        """Remove requests that were cancelled or have failed."""
        self._waiting = deque(request for request in self._waiting if not request.future.done())
        self._put_back = [row for row in self._put_back if not row.request.future.done()]
        for context in self._contexts.values():
            context.rows = [row for row in context.rows if not row.request.future.done()]
        self._contexts = {key: context for key, context in self._contexts.items() if context.rows}
        self._release([row for row in self._rows if row.request.future.done()])

    def _release(self, rows: Sequence[Row]) -> None:
        if rows:
            self._kv_cache.remove(rows)
            ended = set(rows)
            self._rows = [row for row in self._rows if row not in ended]

    def _admit(self) -> None:
        """Start samples in order of arrival, as many as fit; those with the same tokens so far share a context."""
        rows = len(self._rows) + sum(len(context.rows) for context in self._contexts.values())
        used, prefill = self._positions(), 0
        while rows < MAX_ROWS and (upcoming := self._upcoming()):
            request, tokens = upcoming
            key = id(request.adapter), request.lacks_prompt_logprobs and id(request), tuple(tokens)
            context = self._contexts.get(key) or self._context(request, tokens)
            more = context.positions(len(context.rows) + 1) - context.positions(len(context.rows))
            if rows and (used + more) * self._base.cache_bytes > MAX_CACHE_BYTES:
                break
            if key not in self._contexts:
                prefill += 0 if context.is_long else context.lacking
                if prefill > PREFILL_TOKENS:
                    break
                self._contexts[key] = context
            context.rows.append(self._pop())
            rows += 1
            used += more

    def _upcoming(self) -> tuple[Request, list[int]] | None:
        """Return the request of the next sample, and the sample's tokens so far."""
        if self._put_back:
            return self._put_back[0].request, self._put_back[0].context
        return (self._waiting[0], self._waiting[0].prompt) if self._waiting else None

    def _pop(self) -> Row:
        if self._put_back:
            return self._put_back.pop(0)
        request = self._waiting[0]
        row = request.start()
        if request.started == request.num_samples:
            self._waiting.popleft()
        return row

    def _context(self, request: Request, tokens: list[int]) -> _Context:
        if request.lacks_prompt_logprobs:
            return _Context(request, tokens)
        prefix, matched = self._prefixes.find(request.adapter, tokens)
        joins = prefix is not None and matched == len(tokens) and self._kv_cache.sharing(prefix)
        return _Context(request, tokens, prefix, matched, joins=joins)

    def _start(self, contexts: list[_Context]) -> None:
        """Generate the next token of each row of contexts that are computed."""
        if not contexts:
            return
        self._contexts = {key: context for key, context in self._contexts.items() if context not in contexts}
        reused = sum(len(context.tokens) * len(context.rows) - context.computed for context in contexts)
        last = self._logprobs(torch.stack([context.whole.last for context in contexts]))
        owners = [i for i, context in enumerate(contexts) for _ in context.rows]
        starting = [row for context in contexts for row in context.rows]
        ended = self._extend(starting, last[owners])
        for row, i, has_ended in zip(starting, owners, ended, strict=True):
            if not has_ended:
                self._kv_cache.add(row, contexts[i].whole, shared=contexts[i].is_shared)
                self._rows.append(row)
        self._count(reused=reused)

    def _prefill(self, contexts: Sequence[_Context], chunk: int) -> None:
        """Compute the rest of contexts that have equally much already, or the next `chunk` positions of a long one."""
        first, done = contexts[0], contexts[0].matched
        limit = chunk if first.is_long else PREFILL_TOKENS
        lengths = [min(context.lacking, limit) for context in contexts]
        # Padding on the right needs no mask, since causal attention uses no position to the right.
        tokens = torch.zeros(len(contexts), max(lengths), dtype=torch.int64)
        for row, context, length in zip(tokens, contexts, lengths, strict=True):
            row[:length] = torch.tensor(context.tokens[done : done + length])
        prefill = first.prefill or Prefill(
            max(len(context.tokens) for context in contexts), [context.prefix for context in contexts], done
        )
        with using(self._prefilling.combine([context.request.adapter for context in contexts])):
            hidden = self._base.hidden(tokens, **prefill.next(max(lengths)))
        for index, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
            self._score_prompt(context, hidden[index, :length])
            context.matched += length
            context.computed += length
            context.prefill = prefill
            if not context.lacking:
                self._finish_prefill(context, prefill, index, hidden[index, length - 1])
        self._count(prefilled=sum(lengths))

    def _finish_prefill(self, context: _Context, prefill: Prefill, index: int, last: Tensor) -> None:
        context.prefill = None
        context.prefix = Prefix.of(prefill.cache, index, len(context.tokens), last)
        if context.request.lacks_prompt_logprobs:
            context.request.prompt_logprobs = [None, *context.scores]
        if context.is_prompt:
            self._prefixes.add(context.request.adapter, context.tokens, context.prefix, limit=MAX_PREFIX_BYTES)

    def _decode(self) -> None:
        """Generate one more token for every row."""
        self._make_room()
        rows, placement = self._kv_cache.next()
        tokens = torch.tensor([row.tokens[-1:] for row in rows])
        with using(self._decoding.combine([row.request.adapter for row in rows])):
            hidden = self._base.hidden(tokens, **placement)
        ended = self._extend(rows, self._logprobs(hidden[:, -1]))
        self._release([row for row, has_ended in zip(rows, ended, strict=True) if has_ended])

    def _make_room(self) -> None:
        """Put the youngest rows back until the next step of the others fits in memory."""
        while len(self._rows) > 1 and self._positions() * self._base.cache_bytes > MAX_CACHE_BYTES:
            youngest = max(self._rows, key=lambda row: row.age)
            self._release([youngest])
            self._put_back.insert(0, youngest)
            self._count(put_back=1)

    def _extend(self, rows: Sequence[Row], logprobs: Tensor) -> list[bool]:
        """Add a token to each row by its own sampling parameters; return which rows have ended."""
        tokens = pick(logprobs, [row.request.params for row in rows], [row.random.random() for row in rows])
        own = logprobs[torch.arange(len(rows)), tokens].tolist()
        return [
            row.accept(token, logprob, self._base.tokenizer)
            for row, token, logprob in zip(rows, tokens, own, strict=True)
        ]

    def _logprobs(self, states: Tensor) -> Tensor:
        return self._base.logits(states).log_softmax(-1).cpu()

    def _score_prompt(self, context: _Context, states: Tensor) -> None:
        """Add the logprobs of the prompt's tokens after the next positions, if the request wants them."""
        request = context.request
        if not request.lacks_prompt_logprobs or request.wanted_prompt_logprobs is None:
            return
        following = torch.tensor(context.tokens[context.matched + 1 : context.matched + len(states) + 1])
        for part, targets in zip(
            states[: len(following)].split(HEAD_POSITIONS), following.split(HEAD_POSITIONS), strict=True
        ):
            logprobs = self._logprobs(part)
            own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
            best = logprobs.topk(request.wanted_prompt_logprobs)
            for row in zip(targets.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True):
                token, logprob, top_ids, top_logprobs = row
                context.scores.append({token: logprob} | dict(zip(top_ids, top_logprobs, strict=True)))


@dataclass(eq=False)
class _Context:
    """Rows that start from the same tokens with the same adapter, which is that of `request`.

    `prefix` has the first `matched` of the tokens, and all of them after the prefill, which takes several passes if it
    `is_long`; `prefill` is one that has begun, and `computed` its positions so far. `scores` are the logprobs of the
    prompt, if `request` wants them; such a context is that of one request alone.
    """

    request: Request
    tokens: list[int]
    prefix: Prefix | None = None
    matched: int = 0
    joins: bool = False
    """Whether rows under way share this prefix already."""
    rows: list[Row] = field(default_factory=list)
    prefill: Prefill | None = None
    computed: int = 0
    scores: list[dict[int, float]] = field(default_factory=list)
    is_long: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_long = self.lacking > PREFILL_TOKENS

    @property
    def lacking(self) -> int:
        """The number of positions that are not computed yet."""
        return len(self.tokens) - self.matched

    @property
    def whole(self) -> Prefix:
        if self.prefix is None:
            raise AssertionError("the prefill has not run")
        return self.prefix

    @property
    def is_prompt(self) -> bool:
        return self.tokens is self.request.prompt

    @property
    def is_shared(self) -> bool:
        return self._shares(len(self.rows))

    def positions(self, rows: int) -> int:
        """Return the positions of the KV cache that this many rows add to it."""
        if not self._shares(rows):
            return rows * capacity(len(self.tokens) + 1)
        return rows * capacity(1) + (0 if self.joins else len(self.tokens))

    def _shares(self, rows: int) -> bool:
        return self.joins or (rows - 1) * len(self.tokens) >= SHARED_POSITIONS


def _prefills(contexts: Sequence[_Context], *, with_long: bool) -> Iterator[list[_Context]]:
    """Yield what to compute before the next decoding step.

    These are the contexts that lack positions, in batches that have equally much already and are of similar length; of
    those that are long, the oldest alone.
    """
    if with_long:
        yield from ([context] for context in [one for one in contexts if one.is_long and one.lacking][:1])
    # Grouped before the first is computed, since that changes `matched`.
    groups: defaultdict[int, list[_Context]] = defaultdict(list)
    for context in sorted(contexts, key=lambda one: len(one.tokens)):
        if context.lacking and not context.is_long:
            groups[context.matched].append(context)
    for matched, group in groups.items():
        batch: list[_Context] = []
        for context in group:
            if batch and (len(batch) + 1) * (len(context.tokens) - matched) > PREFILL_TOKENS:
                yield batch
                batch = []
            batch.append(context)
        yield batch


@contextmanager
def _failing_together(requests: Collection[Request]) -> Iterator[None]:
    """Let these requests fail with an error that is raised inside the block; the thread continues."""
    try:
        yield
    except Exception as error:
        _log.exception("sampling failed for %d requests", len(requests))
        for request in requests:
            request.fail(error)
