"""Fields of the body that the API has none for: only what the operator allows, and nothing that is said otherwise."""

from __future__ import annotations

import json

import pytest

from deltawire_server.errors import CallerError, Reason
from deltawire_server.fake_vllm.described import CHAT_FIELDS
from deltawire_server.upstream.extra_body import allowed_extra
from deltawire_server.upstream.request import ChatMessage, ChatRequest, Role
from deltawire_server.upstream.vllm_fields import FIELDS
from deltawire_server.upstream.vllm_request import chat_body


def violations(text: str, *allowed: str) -> dict[str, str]:
    """The fields that are refused, with the violations."""
    with pytest.raises(CallerError) as caught:
        allowed_extra(text, allowed, "gpu")
    assert caught.value.reason is Reason.INVALID_REQUEST
    return {violation.field: violation.description for violation in caught.value.violations}


def test_none() -> None:
    """Whatever is allowed."""
    assert allowed_extra("", (), "gpu") == {}


@pytest.mark.parametrize("allowed", [("return_token_ids", "echo"), ("echo", "return_*"), ("*",)])
def test_what_is_allowed(allowed: tuple[str, ...]) -> None:
    """By name or pattern; the values are the text that came."""
    extra = allowed_extra('{"echo": 1.0, "return_token_ids": [ 1 ]}', allowed, "gpu")
    assert {name: bytes(value) for name, value in extra.items()} == {"echo": b"1.0", "return_token_ids": b"[ 1 ]"}


@pytest.mark.parametrize("allowed", [(), ("ECHO", "ech")])
def test_what_is_not_allowed(allowed: tuple[str, ...]) -> None:
    """The operator's setting is the remedy, and it is named."""
    found = violations('{"echo": true}', *allowed)
    assert found.keys() == {"chat.extra_body.echo"}
    assert "allowed_extra_fields" in found["chat.extra_body.echo"]
    assert "[providers.gpu]" in found["chat.extra_body.echo"]


@pytest.mark.parametrize("name", FIELDS)
def test_what_has_a_field_of_its_own(name: str) -> None:
    """Also if everything is allowed: the field to use is named."""
    assert FIELDS[name] in violations(json.dumps({name: 1}), "*")[f"chat.extra_body.{name}"]


@pytest.mark.parametrize("name", ["stream", "stream_options", "request_id"])
def test_what_the_gateway_says(name: str) -> None:
    """Without these there is no stream to read, or none that can be followed."""
    assert "set by the gateway" in violations(json.dumps({name: 1}), "*")[f"chat.extra_body.{name}"]


def test_nothing_that_is_always_sent_can_be_replaced() -> None:
    """A member that every body gets later has to be thought of."""
    always = chat_body(ChatRequest("m", (ChatMessage(Role.USER, ("hi",)),)), "m")
    assert violations(json.dumps(dict.fromkeys(always)), "*").keys() == {f"chat.extra_body.{name}" for name in always}


def test_all_that_is_wrong_is_told_at_once() -> None:
    """In the order in which it came, with what is allowed left out."""
    found = violations('{"stop": [], "echo": true, "x": 1, "stream": false}', "echo")
    assert [*found] == ["chat.extra_body.stop", "chat.extra_body.x", "chat.extra_body.stream"]


REACHING = [
    *(
        "chat_template",
        "chat_template_content_format",
        "kv_transfer_params",
        "ec_transfer_params",
        "mm_processor_kwargs",
    ),
    *(
        "media_io_kwargs",
        "vllm_xargs",
        "mm_payload",
        "return_mm_kwargs",
        "logits_processors",
        "a_later_versions_kwargs",
    ),
]
"""Fields with which a caller would have the engine run templates or code, fetch, or send its cache to an address."""


@pytest.mark.parametrize("name", REACHING)
def test_what_no_pattern_covers(name: str) -> None:
    """Neither all nor a narrow one; the operator has to write the name, and the violation says so."""
    text = json.dumps({name: 1, "echo": 1})
    for pattern in ("*", f"{name[:-1]}*", f"{name[:-1]}?", f"[{name[0]}]{name[1:]}"):
        found = violations(text, "echo", pattern)
        assert found.keys() == {f"chat.extra_body.{name}"}
        assert "by its exact name, because patterns do not match" in found[f"chat.extra_body.{name}"]
    assert allowed_extra(text, ("*", name), "gpu").keys() == {name, "echo"}
    assert "by its name" not in violations(text, "echo")[f"chat.extra_body.{name}"]


def test_every_field_of_a_vllm_that_reaches_outside() -> None:
    """Of those that vLLM 0.32 has, these must be named. A new field in the list fails here until it is classified."""
    others = [
        name for name in CHAT_FIELDS if name not in FIELDS and name not in {"stream", "stream_options", "request_id"}
    ]
    covered = set(others) - {field.rpartition(".")[2] for field in violations(json.dumps(dict.fromkeys(others)), "*")}
    assert set(others) - covered == {
        *("chat_template", "media_io_kwargs", "mm_processor_kwargs", "mm_payload", "return_mm_kwargs"),
        *("kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
    }
