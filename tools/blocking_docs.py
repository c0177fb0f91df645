"""Make documentation blocking: docstrings and example code of `loops_async`, as `loops_sync` has them."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Final

TWIN: Final = "loops_sync"

PROPERTIES: Final = frozenset({"TrainingClient.policy_version"})
"""Coroutines without arguments that the published contract has as properties of the blocking client."""

PROSE: Final = {
    "ServiceClient": (
        "The constructor creates the session. It raises AuthenticationError if the API key was rejected, ConnectError "
        "if no server answers at `base_url`, ProtocolError if that server is not a Loops service, and JournalError if "
        "the journal cannot be used. `close`, leaving the ``with`` block or garbage collection ends every background "
        "task and connection. Any number of threads may use a client at once. Ctrl-C cancels the call that waits. Each "
        "`on_progress` is called in the thread that made the call: it may block and use the client, and an exception "
        "that it raises ends the call."
    ),
    "AgentGateway": (
        "The server runs in the thread that makes all calls of this package, so agents may block, in any other thread."
    ),
    "AgentRollout.openai_client": ("It is an ``openai.OpenAI``; with ``blocking=False`` an ``openai.AsyncOpenAI``."),
    "AgentRollout.anthropic_client": (
        "It is an ``anthropic.Anthropic``; with ``blocking=False`` an ``anthropic.AsyncAnthropic``."
    ),
    "RolloutContext.run": (
        "Each rollout has a thread of its own, so it may block and wait by itself. This is for what takes long on the "
        "CPU: all threads of a program share one, and an `executor` with processes has more."
    ),
    "TrainingClient.rollouts": (
        "Each running rollout has a thread of its own, of which there may be thousands; `tasks` are read in worker "
        "threads, too. A rollout that is no longer needed is cancelled: the call of this package that it waits for, or "
        "its next one, raises `asyncio.CancelledError`, which is no `Exception`, so that the rollout ends after its "
        "own clean-up. A rollout that computes or sleeps cannot be interrupted; leaving the stream waits for it, and "
        "logs a warning after 5 s. A function for `advantages` holds up all rollouts, so it must be quick."
    ),
    "SamplingClient.sample_many": "Worker threads read the prompts one by one: reading may block and use the client.",
}
"""Replacements for the one paragraph of a docstring that is about awaiting or event loops."""

ASYNC_ONLY: Final = re.compile(r"event loop|\bcorouti|\bawait|\basync|`open`", re.IGNORECASE)
"""Words of prose that is true of one form only."""


OTHER_FORM: Final = "%%"
"""The line of a block of both forms behind which its blocking form stands, if no rule makes it."""


class GenerationError(Exception):
    """The core has a construct that no rule covers."""


CODE_RULES: Final = (
    (r"(?<![\w\])])\(await ([\w.]+)\)", r"\1.result()"),
    (r"(?<![\w\])])\(await ([\w.]+\([^()]*\))\)", r"\1"),
    (r"\bawait ([\w.]+)(?![\w.(\[])", r"\1.result()"),
    (r"\b(await|async) ", ""),
    (rf"\.({'|'.join(name.split('.')[1] for name in PROPERTIES)})\(\)", r".\1"),
    (r"(?m)^import asyncio\n+", ""),
    (r"\basyncio\.run\((\w+\([^()]*\))\)", r"\1"),
    (r"(ServiceClient(?:\.local)?\([^()]*\))\.open\(\)", r"\1"),
    (r"\bloops_local\.LocalService\(", "loops_local.serve_in_thread("),
)
"""Substitutions that make example code blocking, in this order."""


def blocking_docstring(doc: str, core: str, replacement: str | None = None) -> str:
    """Return the literal of a docstring whose code blocks are made blocking, and whose prose is true of both forms.

    `replacement` replaces the one paragraph that is not.
    """
    parts = []
    for text, is_code in _paragraphs(inspect.cleandoc(doc)):
        if is_code:
            parts.append(blocking_code(text, core))
        elif not ASYNC_ONLY.search(text):
            parts.append(text)
        elif replacement is not None:
            parts.append(textwrap.fill(replacement, 112))
            replacement = None
        else:
            sentences = re.split(r"(?<=[.;:]) ", " ".join(text.split()))
            raise GenerationError(f"true of one form only (see PROSE): {next(filter(ASYNC_ONLY.search, sentences))}")
    if replacement is not None:
        raise GenerationError(f"no paragraph needs the replacement in PROSE: {replacement}")
    text = "\n\n".join(parts)
    if unknown := re.search(r'\\|"""|```|>>>', text):
        raise GenerationError(f"no rule for {unknown[0]} in a docstring")
    return f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'


def _paragraphs(doc: str) -> Iterator[tuple[str, bool]]:
    """Yield each paragraph, and whether it belongs to a code block."""
    margin = None
    for text in re.split(r"\n\s*\n", doc):
        first, last = text.split("\n")[0], text.split("\n")[-1]
        if margin is not None and len(first) - len(first.lstrip()) <= margin:
            margin = None
        yield text, margin is not None
        if margin is None and last.endswith("::"):
            margin = len(last) - len(last.lstrip())


def blocking_code(code: str, core: str) -> str:
    """Return example code without ``async`` and ``await``."""
    blocking = code.replace(core, TWIN)
    for pattern, replacement in CODE_RULES:
        blocking = re.sub(pattern, replacement, blocking)
    if rest := re.search(rf".*({ASYNC_ONLY.pattern}).*", blocking, re.IGNORECASE):
        raise GenerationError(f"no rule for the example: {rest[0].strip()}")
    return blocking


def both_forms(block: str, core: str) -> tuple[str, str]:
    """Return the async and the blocking form of a block of a page."""
    asynchronous, mark, blocking = block.partition(f"\n{OTHER_FORM}\n")
    return (f"{asynchronous}\n", blocking) if mark else (block, blocking_code(block, core))
