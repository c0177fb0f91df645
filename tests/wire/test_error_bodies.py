"""What an error says, whichever generation of services its body is from (control-plane 1.2)."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from loops_async import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    ServerError,
    ServiceClient,
)
from tests.support.clock import Clock
from tests.support.scripted import KEY, Say, ScriptedService

CAPABILITIES = "/v1/loops/capabilities"


async def error_of(client: ServiceClient, service: ScriptedService, reply: Say) -> ApiError:
    service.always("GET", CAPABILITIES, reply)
    with pytest.raises(ApiError) as raised:
        await client.get_server_capabilities()
    return raised.value


@pytest.mark.parametrize(
    ("body", "said", "code", "reason"),
    [
        ({"code": "VALIDATION_ERROR", "message": "Give one."}, "Give one.", "VALIDATION_ERROR", None),
        ({"error": "model is not ready"}, "model is not ready", None, None),
        ({"detail": "no such run"}, "no such run", None, None),
        ({"error": {"message": "too long", "type": "BadRequestError", "code": 400}}, "too long", None, None),
        ({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}, "m", None, None),
        (
            {"code": "X", "message": "m", "details": {"reason": "NOT_PRESIGNABLE"}},
            "m",
            "X",
            "NOT_PRESIGNABLE",
        ),
        ({"code": "X", "message": "m", "details": "text"}, "m", "X", None),
        ({"detail": "", "error": None, "message": "third"}, "third", None, None),
        (
            {"detail": [{"loc": ["body", "lora_rank"], "msg": "too small"}]},
            '{"detail": [{"loc": ["body", "lora_rank"], "msg": "too small"}]}',
            None,
            None,
        ),
        ({"unheard": "of"}, '{"unheard": "of"}', None, None),
        ({}, "{}", None, None),
        ([1, 2], "[1, 2]", None, None),
        ("plain text", "plain text", None, None),
        ("<html>\n\n<b>Bad</b>\n</html>", "<html> <b>Bad</b> </html>", None, None),
        (b"\xff\xfe", "\ufffd\ufffd", None, None),
        ("", "(empty body)", None, None),
    ],
    ids=repr,
)
async def test_every_shape(
    client: ServiceClient, service: ScriptedService, body: Any, said: str, code: str | None, reason: str | None
) -> None:
    error = await error_of(client, service, Say(422, body))
    assert str(error) == f"get capabilities (GET {service.url}{CAPABILITIES}): answered 422: {said}"
    assert (error.code, error.reason) == (code, reason)


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        ({"detail": [{"loc": ["body"], "msg": "small"}]}, {"detail": [{"loc": ["body"], "msg": "small"}]}),
        ([1, None, "é"], [1, None, "é"]),
        ("<b>Bad</b>", "<b>Bad</b>"),
        ("", None),
        (
            {"detail": f"the key {KEY}", "api_key": "other", "url": "https://s3/a?X-Amz-Signature=abc"},
            {"detail": "the key [REDACTED]", "api_key": "[REDACTED]", "url": "https://s3/a?…"},
        ),
        ({"detail": "x" * 20_000}, '{"detail": "' + "x" * (16 * 1024 - 12)),
    ],
    ids=["json", "list", "text", "empty", "secrets", "long"],
)
async def test_its_body(client: ServiceClient, service: ScriptedService, sent: Any, body: Any) -> None:
    error = await error_of(client, service, Say(422, sent))
    assert error.body == body
    assert pickle.loads(pickle.dumps(error)).body == body


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (400, BadRequestError, ""),
        (401, AuthenticationError, "Check the API key"),
        (403, PermissionDeniedError, "ask the workspace's admin"),
        (404, NotFoundError, "Check the id"),
        (409, ConflictError, ""),
        (410, NotFoundError, ""),
        (413, BadRequestError, ""),
        (418, ApiError, ""),
        (422, BadRequestError, ""),
        (500, ServerError, ""),
        (501, ServerError, ""),
    ],
)
async def test_every_status(
    client: ServiceClient, service: ScriptedService, status: int, kind: type[ApiError], advice: str
) -> None:
    error = await error_of(client, service, Say(status, {"message": "m"}))
    assert type(error) is kind
    assert error.status == status
    assert not error.retryable
    assert f"answered {status}: m" in str(error)
    assert advice in str(error)
    assert len(service.seen_at("GET", CAPABILITIES)) == 1


@pytest.mark.parametrize("status", [408, 502, 503, 504])
async def test_a_bad_moment_is_waited_out_for_over_a_minute(
    client: ServiceClient, service: ScriptedService, quick: Clock, status: int
) -> None:
    error = await error_of(client, service, Say(status, {"message": "busy"}))
    assert error.retryable
    assert quick.now > 60
    assert 10 < len(service.seen_at("GET", CAPABILITIES)) <= 30


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", None), ("", None)]
)
async def test_how_long_to_wait(
    client: ServiceClient, service: ScriptedService, quick: Clock, header: str, seconds: float | None
) -> None:
    error = await error_of(client, service, Say(429, {"message": "slow down"}, {"Retry-After": header}))
    assert isinstance(error, RateLimitError)
    assert error.retry_after == seconds


@pytest.mark.parametrize("name", ["X-Request-Id", "X-Baseten-Request-Id"])
async def test_the_id_to_quote(client: ServiceClient, service: ScriptedService, name: str) -> None:
    error = await error_of(client, service, Say(500, {"message": "m"}, {name: "req-7"}))
    assert error.request_id == "req-7"
    assert "[request id req-7]" in str(error)


async def test_an_endless_message_is_cut(client: ServiceClient, service: ScriptedService) -> None:
    for body in ({"message": "x" * 100_000}, {"detail": ["x" * 100_000]}, "x" * 100_000):
        assert len(str(await error_of(client, service, Say(422, body)))) < 2500


ESCAPES = "\x1b]0;title\x07\x1b[2J\u202e\r\nforged: line"
VISIBLE = r"\x1b]0;title\x07\x1b[2J\u202e forged: line"


@pytest.mark.parametrize("body", [{"message": ESCAPES}, {"detail": ESCAPES}, ESCAPES], ids=repr)
async def test_control_characters_of_a_service_are_made_visible(
    client: ServiceClient, service: ScriptedService, body: Any
) -> None:
    assert str(await error_of(client, service, Say(422, body))).endswith(f"answered 422: {VISIBLE}")


async def test_ids_and_codes_are_as_harmless_as_the_message(client: ServiceClient, service: ScriptedService) -> None:
    body = {"code": f"C{ESCAPES}{KEY}", "message": "m", "details": {"reason": f"R{KEY}" + "x" * 10_000}}
    error = await error_of(client, service, Say(422, body, {"X-Request-Id": f"req {KEY}" + "y" * 5000}))
    assert error.code == f"C{VISIBLE}***"
    assert error.reason is not None
    assert error.reason.startswith("R***xxx")
    assert error.request_id is not None
    assert error.request_id.startswith("req ***yyy")
    assert max(len(error.reason), len(error.request_id)) <= 200
    assert len(str(error)) < 500
    assert KEY.encode() not in pickle.dumps(error)


async def test_the_key_in_a_content_type_is_not_shown(client: ServiceClient, service: ScriptedService) -> None:
    service.answer("GET", CAPABILITIES, Say(200, "odd", {"Content-Type": f"text/{KEY}"}))
    with pytest.raises(ProtocolError, match=r"text/\*\*\*") as odd:
        await client.get_server_capabilities()
    assert KEY not in str(odd.value)


@pytest.mark.parametrize("status", [404, 405])
async def test_an_error_page_is_another_server(client: ServiceClient, service: ScriptedService, status: int) -> None:
    service.answer("GET", CAPABILITIES, Say(status, "404: Not Found"))
    with pytest.raises(ProtocolError, match=r"Is 127.0.0.1:\d+ a Loops service\? Check base_url"):
        await client.get_server_capabilities()
