"""Every Python block of README.md and of every page runs in both colours, and prints what the page says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loops_async
import loops_local
from tests.docs.byte_tokenizer import ByteTokenizer, DrawingTokenizer
from tests.docs.pages import Name, Page, page, pages, run_page
from tests.support import openai_stub, torch_engine
from tools.blocking_docs import GenerationError

SESSIONS = [
    pytest.param(page, colour, id=f"{page}-{colour}", marks=[pytest.mark.torch] if page.engine == "tiny" else [])
    for page in pages()
    for colour in page.colours
]
GIVEN = {"README": {"tasks": [("is fire cold?", "no"), ("is snow white?", "yes")] * 4}}
"""What a page takes for granted and does not define, not even in a hidden block."""
ONE_PAGE = """# Title

```{colours}
:hidden:
import loops_async as loops

service = await loops.ServiceClient().open()
```

```python
from pathlib import Path

before = len([*Path().iterdir()])
```

```{colours}
trainer = await service.create_lora_training_client("echo", rank=8)
step = await trainer.forward(
    [loops.Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})], "cross_entropy"
)
print(before, (await step).loss)
```

```text
0 ...
```

```{colours}
print(loops.__name__, "awaited")
%%
print(loops.__name__)
```
"""


@pytest.fixture(scope="module")
def tiny_service() -> Iterator[loops_local.LocalService]:
    """One service that really trains; importing torch takes seconds."""
    pytest.importorskip("torch", reason="NOT TESTED: a page that needs torch")
    torch_engine.import_it_here()
    with loops_local.serve_in_thread(engine="torch", model="tiny", provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(autouse=True)
def openai(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package has tests of its own, in `tests/judges`."""
    monkeypatch.setitem(sys.modules, "openai", openai_stub.module())


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> list[loops_async.RolloutBatch]:
    """The batches of all streams."""
    batches: list[loops_async.RolloutBatch] = []
    next_batch = loops_async.RolloutStream.__anext__

    async def noted(stream: loops_async.RolloutStream) -> loops_async.RolloutBatch:
        batches.append(await next_batch(stream))
        return batches[-1]

    monkeypatch.setattr(loops_async.RolloutStream, "__anext__", noted)
    return batches


def serve(local: loops_local.LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPS_BASE_URL", local.base_url)
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)


def replace_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one takes seconds to import."""

    async def get_tokenizer(_: object) -> Any:
        return tokenizer

    for client in (loops_async.TrainingClient, loops_async.SamplingClient):
        monkeypatch.setattr(client, "get_tokenizer", get_tokenizer)


@pytest.mark.parametrize(("page", "colour"), SESSIONS)
def test_page(
    page: Page,
    colour: Name,
    handed_out: list[loops_async.RolloutBatch],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve(request.getfixturevalue(f"{page.engine}_service"), monkeypatch)
    if page.engine == "echo":
        is_about_rollouts = any(".rollouts(" in code for block in page.blocks for code in block.forms.values())
        replace_tokenizer(DrawingTokenizer() if is_about_rollouts else ByteTokenizer(), monkeypatch)
    for block in run_page(page, colour, GIVEN.get(page.name)):
        assert handed_out or ".rollouts(" not in block.forms[colour], f"{block.place} trains nothing"
        handed_out.clear()


@pytest.mark.parametrize("colour", ["async", "blocking"])
def test_the_blocks_of_a_page_are_one_session(
    colour: Name, echo_service: loops_local.LocalService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(echo_service, monkeypatch)
    assert len([*run_page(written(tmp_path, ONE_PAGE), colour)]) == 4


def test_the_output_is_compared(tmp_path: Path) -> None:
    wrong = written(tmp_path, "```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: print\(1\) printed '1"):
        [*run_page(wrong, "async")]


def test_a_block_of_one_colour_runs_in_it_alone(tmp_path: Path) -> None:
    blocks = written(tmp_path, "```python\nimport loops_sync\n```\n```python\nawait f()\n```\n").blocks
    assert [[*block.forms] for block in blocks] == [["blocking"], ["async"]]


def test_a_block_is_left_out_only_with_a_reason(tmp_path: Path) -> None:
    left_out = "<!-- not run: it needs a GPU -->\n```python\nraise ValueError\n```\n"
    assert written(tmp_path, left_out).blocks == ()
    assert len(written(tmp_path, left_out.replace("it needs a GPU", "")).blocks) == 1


@pytest.mark.parametrize("block", ["- list\n  ```python\n  f()\n  ```\n", "```{code-block} python\nf()\n```\n"])
def test_a_block_that_would_not_be_run_is_an_error(block: str, tmp_path: Path) -> None:
    with pytest.raises(SyntaxError, match="1 blocks of Python, 0"):
        written(tmp_path, block)


def test_a_block_without_a_blocking_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"page\.md:1: no rule for the example: asyncio\.gather"):
        written(tmp_path, "```{colours}\nawait asyncio.gather(f())\n```\n")


def written(folder: Path, text: str) -> Page:
    path = folder / "page.md"
    path.write_text(text)
    return page(path)


def test_pages_are_found() -> None:
    """The parametrized test above would pass without a word if nothing were found."""
    assert {"README", "async-rl", "multi-turn"} <= {page.name for page in pages()}
