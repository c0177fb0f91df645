"""The dashboard of the embedded service in Debian's Chromium; `tests/service/test_dashboard.py` is about its data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

import loops_sync as loops
from loops_local import LocalService, serve_in_thread
from tests.support.browser import PHONE, brightness_of, width_of
from tests.support.patience import PATIENCE_SECONDS

Open: TypeAlias = Callable[..., Any]

HOSTILE = '"><img src=x onerror="window.hit=1"><script>window.hit=2</script>' + "w" * 150 + "\u202e"
DATA = [loops.Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})]


@pytest.fixture(scope="module")
def local() -> Iterator[LocalService]:
    with serve_in_thread(engine="echo", provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture(scope="module")
def service(local: LocalService) -> Iterator[loops.ServiceClient]:
    with loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="deactivate") as service:
        yield service


@pytest.fixture(scope="module")
def trainer(service: loops.ServiceClient) -> loops.TrainingClient:
    """A run that was trained for three steps, and sampled."""
    trainer = service.create_lora_training_client("echo", rank=8, name="a calm name")
    for _ in range(3):
        trainer.step(DATA, "cross_entropy", loops.AdamParams()).result()
    sampler = trainer.save_weights_and_get_sampling_client("three")
    sampler.sample([1, 2], sampling_params=loops.SamplingParams(max_tokens=2))
    return trainer


@pytest.fixture(scope="module")
def hostile(service: loops.ServiceClient) -> loops.TrainingClient:
    """A run whose names are an attack."""
    trainer = service.create_lora_training_client("echo", rank=8, name=HOSTILE)
    trainer.step(DATA, "cross_entropy", loops.AdamParams()).result()
    trainer.save_weights_and_get_sampling_client(HOSTILE.replace("/", "").replace("\u202e", ""))
    return trainer


@pytest.fixture
def opened(browser: Any, local: LocalService) -> Iterator[Open]:
    """A function that opens the dashboard, with options of the browser's context; the console must stay empty."""
    contexts: list[Any] = []
    asked: list[str] = []
    said: list[str] = []

    def opened(url: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.said = said
        page.goto(url or local.dashboard_url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(f"{local.base_url}/dashboard")] == []
    assert said == []


def row_of(page: Any, run_id: str) -> Any:
    row = page.locator("#runs tbody tr", has_text=run_id)
    row.wait_for()
    return row


def look_again(page: Any) -> None:
    """Have the page read its data now, and not within two seconds, as when it is looked at again."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def enter_run(page: Any, run_id: str) -> None:
    row_of(page, run_id).locator("a").click()
    page.locator("#run-curves path.line").first.wait_for(state="attached")


def test_it_shows_a_run_and_takes_the_token_out_of_the_address(
    opened: Open, local: LocalService, trainer: loops.TrainingClient
) -> None:
    page = opened()
    row = row_of(page, trainer.run_id)
    assert "token" not in page.url
    cells = {cell.get_attribute("data-title"): cell.inner_text() for cell in row.locator("td").all()}
    assert cells["Run"].split("\n") == ["a calm name", trainer.run_id]
    assert (cells["Model"], cells["Rank"], cells["Status"]) == ("echo", "8", "running")
    assert (cells["Step"], cells["Version"]) == ("3", "3")
    assert re.fullmatch(r"0\.\d{3}", cells["Loss"].strip())
    assert row.locator("svg path.line").count() == 1
    assert local.base_url in page.locator("#facts").inner_text()
    page.reload()
    row_of(page, trainer.run_id)


def test_a_run_is_drawn_with_its_versions_and_follows_the_training(opened: Open, service: loops.ServiceClient) -> None:
    trainer = service.create_lora_training_client("echo", rank=4)
    trainer.step(DATA, "cross_entropy", loops.AdamParams()).result()
    page = opened()
    enter_run(page, trainer.run_id)
    assert page.url.endswith(f"#run={trainer.run_id}")
    assert page.locator("#run-curves h3").all_inner_texts() == ["Loss", "Gradient norm"]
    assert page.locator("#run-curves .mark").count() == 0
    trainer.step(DATA, "cross_entropy", loops.AdamParams()).result()
    trainer.save_weights_and_get_sampling_client("two")
    page.locator("#run-curves .mark-name", has_text="v2").first.wait_for()
    assert "step 1" in page.locator("#run-curves article").first.inner_text()
    page.locator("#run .back a").click()
    row_of(page, trainer.run_id)


def test_the_values_at_the_pointer_are_shown(opened: Open, trainer: loops.TrainingClient) -> None:
    page = opened()
    enter_run(page, trainer.run_id)
    card = page.locator("#run-curves article").first
    newest = card.locator(".value b").inner_text()
    box = card.locator("svg").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    card.locator(".at", has_text="step 1").wait_for()
    assert card.locator(".value b").inner_text() != newest
    page.mouse.move(0, 0)
    card.locator(".value b", has_text=newest).wait_for()


def test_names_are_text(opened: Open, local: LocalService, hostile: loops.TrainingClient) -> None:
    local.faults.answer(HOSTILE, 500)
    with pytest.raises(loops.RemoteOpError):
        hostile.load_state(f"/{HOSTILE}").result()
    hostile.log({HOSTILE[:100]: 1.0})
    hostile.step(DATA, "cross_entropy", loops.AdamParams()).result()
    page = opened()
    assert HOSTILE.strip() in row_of(page, hostile.run_id).inner_text()
    assert HOSTILE[:30] in page.locator("#log").inner_text()
    assert HOSTILE[:30] in page.locator("#faults").inner_text()
    assert HOSTILE[:30] in page.locator("#checkpoints").inner_text()
    enter_run(page, hostile.run_id)
    assert page.locator("#run-name").inner_text() == HOSTILE
    page.locator("#run-curves h3", has_text=HOSTILE[:30]).wait_for()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hit") is None
    local.faults.clear()


def test_nothing_else_may_be_executed_on_the_page(opened: Open, trainer: loops.TrainingClient) -> None:
    page = opened()
    row_of(page, trainer.run_id)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hit = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<i onclick='window.hit = 2'></i>");
            document.querySelector("i").click();
        }"""
    )
    assert page.evaluate("window.hit") is None
    assert "Content Security Policy" in page.said[0]
    page.said.clear()


def test_it_fits_a_phone(opened: Open, hostile: loops.TrainingClient, trainer: loops.TrainingClient) -> None:
    page = opened(viewport=PHONE)
    for run_id in (hostile.run_id, trainer.run_id):
        row_of(page, run_id)
        assert width_of(page) == PHONE["width"]
        enter_run(page, run_id)
        assert width_of(page) == PHONE["width"]
        page.locator("#run .back a").click()


def test_it_is_light_or_dark_as_the_system_is(opened: Open) -> None:
    page = opened(color_scheme="light")
    assert brightness_of(page) > 600
    page.emulate_media(color_scheme="dark")
    assert brightness_of(page) < 200


def test_a_thousand_runs_are_found(opened: Open, trainer: loops.TrainingClient) -> None:
    def many(route: Any) -> None:
        data = route.fetch().json()
        runs = [{**data["runs"][-1], "id": f"run{number}", "name": f"name {number}"} for number in range(1000)]
        route.fulfill(json={**data, "runs": runs})

    page = opened()
    row_of(page, trainer.run_id)
    page.route("**/dashboard/data*", many)
    look_again(page)
    rows = page.locator("#runs tbody tr")
    row_of(page, "run49")
    assert rows.count() == 50
    page.fill("#filter", "NAME 987")
    assert rows.count() == 1
    assert "run987" in rows.inner_text()
    page.fill("#filter", "")
    page.locator("#runs button", has_text="Show all 1,000").click()
    assert rows.count() == 1000


def test_the_figures_of_the_last_minutes_are_drawn(opened: Open, trainer: loops.TrainingClient) -> None:
    def busy(route: Any) -> None:
        data = route.fetch().json()
        figures = {"under_way": 3, "waiting": 2, "memory": 5e8, "p50": 0.02, "p95": 0.5, "samples_per_second": 12.5}
        slices = [{**figures, "time": data["now"] - ago} for ago in (15, 10, 5)]
        samples = {"per_second": 12.5, "p50": 0.02, "p95": 0.5, "under_way": 3}
        route.fulfill(json={**data, "samples": samples, "slices": slices, "memory": 5e8})

    page = opened()
    page.route("**/dashboard/data*", busy)
    look_again(page)
    page.locator("#figures .value b", has_text="12.5").wait_for()
    shown = page.locator("#figures .value").all_inner_texts()
    assert [shown[index].strip() for index in (0, 1, 2, -1)] == ["12.5", "20 ms p50", "500 ms p95", "500 MB"]
    assert page.locator("#figures path.line").count() == 6
    assert {"10", "400 ms", "400 MB", "now"} <= set(page.locator("#figures text").all_text_contents())


def test_without_its_token_it_asks_and_takes_the_api_key(
    opened: Open, local: LocalService, trainer: loops.TrainingClient
) -> None:
    page = opened(f"{local.base_url}/dashboard#token=wrong")
    page.locator("#entry").wait_for()
    assert page.locator("main").locator("visible=true").count() == 0
    page.fill("#key", local.api_key)
    page.locator("#entry button").click()
    row_of(page, trainer.run_id)
    assert local.api_key not in page.content()
    assert all("401" in line for line in page.said)
    page.said.clear()


def test_it_says_that_the_service_is_not_reachable(opened: Open, trainer: loops.TrainingClient) -> None:
    page = opened()
    row_of(page, trainer.run_id)
    page.route("**/dashboard/data*", lambda route: route.abort())
    look_again(page)
    page.locator("#state", has_text="not reachable").wait_for()
    assert page.locator("#runs tbody tr").count() > 0, "what was known stays"
    page.unroute("**/dashboard/data*")
    look_again(page)
    page.locator("#state", has_text="live").wait_for()
    page.said.clear()
