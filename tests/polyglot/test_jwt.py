"""A real Envoy that checks JSON Web Tokens: the gateway's callers are the subjects of valid ones, and nobody else calls."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jwt.algorithms import RSAAlgorithm

from deltawire import AsyncClient, CallError, CompletionNotFoundError
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.polyglot.browser import page, serving
from tests.polyglot.calls import MODEL, gateway
from tests.polyglot.programs import JWT_CONFIG, LIMIT, run, tool
from tests.polyglot.proxy import EXEMPT, ORIGIN, jwt_envoy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire._metadata import Metadata
    from tests.polyglot.proxy import Envoy
    from tests.polyglot.stubs import Builds
    from tests.support.gateway import Lines

pytestmark = pytest.mark.polyglot

KEY = "secret-of-the-caller"
FORGED: Metadata = (("x-deltawire-caller", "ann"),)
ENDLESS = Script.generated(tokens=1_000_000, tokens_per_second=50)


@dataclass(frozen=True)
class Issuer:
    """Signs tokens with the key that Envoy knows."""

    key: rsa.RSAPrivateKey

    def token(self, subject: object = "ann", **claims: object) -> str:
        """A token as the shipped configuration wants it, with other claims; `None` leaves one out."""
        valid = {"iss": "https://issuer.example.com/", "aud": "deltawire", "exp": time.time() + 3600}
        given = {name: claim for name, claim in (valid | {"sub": subject} | claims).items() if claim is not None}
        return jwt.encode(given, self.key, algorithm="RS256")

    def metadata(self, subject: object = "ann", **claims: object) -> Metadata:
        """The token in the header of a call."""
        return (("authorization", f"Bearer {self.token(subject, **claims)}"),)


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """The issuer."""
    return Issuer(rsa.generate_private_key(public_exponent=65537, key_size=2048))


@asynccontextmanager
async def checked(
    vllm: FakeVllm, folder: Path, issuer: Issuer, *flags: str, origin: str = ORIGIN, exempt: str = EXEMPT
) -> AsyncIterator[tuple[Envoy, AsyncClient]]:
    """An Envoy before a gateway on a unix socket with the documented settings, and a client that makes one attempt."""
    keys, socket = folder / "jwks.json", folder / "gateway.sock"
    keys.write_text(json.dumps({"keys": [RSAAlgorithm.to_jwk(issuer.key.public_key(), as_dict=True)]}))
    documented = re.findall(r'^#     (\w+) = \[?"([^"]+)"\]?$', JWT_CONFIG.read_text(encoding="utf-8"), re.MULTILINE)
    listen, *trust = documented
    assert listen == ("listen", "unix:/run/deltawire/gateway.sock")
    assert {name for name, _ in trust} == {"trusted_proxies", "caller_header"}
    settings = [flag for name, value in trust for flag in ("--set", f"access.{name}={value}")]
    async with (
        gateway(vllm, folder, *settings, *flags, "--metrics-listen", "off", listen=f"unix:{socket}"),
        jwt_envoy(folder, socket, keys, origin, exempt) as envoy,
        AsyncClient(envoy.target, options=(("grpc.enable_retries", 0),), timeout=LIMIT) as client,
    ):
        yield envoy, client


def callers(lines: Lines) -> list[str | None]:
    """The caller in the line of each completion."""
    return [entry.get("caller") for entry in lines.entries if entry["event"] == "call" and "Chat" in entry["method"]]


async def refusal(client: AsyncClient, metadata: Metadata) -> tuple[grpc.StatusCode, str | None, str]:
    """Status, reason and message of a call that must fail."""
    with pytest.raises(CallError) as failed:
        await client.chat.create("hi", model=MODEL, metadata=metadata)
    return failed.value.code, failed.value.reason, failed.value.message


async def test_only_valid_tokens_pass(vllm: FakeVllm, tmp_path: Path, issuer: Issuer) -> None:
    """All other calls are refused by Envoy with the documented statuses and reasons, and reach no gateway."""
    other = Issuer(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    unauthenticated = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    denied = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    cases: list[tuple[Metadata, tuple[grpc.StatusCode, str], str]] = [
        ((), unauthenticated, "Jwt is missing"),
        (FORGED, unauthenticated, "Jwt is missing"),
        # A minute is the difference of clocks that Envoy allows.
        (issuer.metadata(exp=time.time() - 120), unauthenticated, "Jwt is expired"),
        (issuer.metadata(exp=None), unauthenticated, "Jwt verification fails"),
        (issuer.metadata(aud="another"), denied, "Audiences in Jwt are not allowed"),
        (issuer.metadata(iss="https://another/"), unauthenticated, "Jwt issuer is not configured"),
        (other.metadata(), unauthenticated, "Jwt verification fails"),
        # No name, and names that the gateway would not accept.
        *(
            (issuer.metadata(subject), unauthenticated, "Jwt verification fails")
            for subject in (None, "", "a b", "a,b")
        ),
    ]
    async with checked(vllm, tmp_path, issuer) as (_, client):
        for metadata, status, message in cases:
            code, reason, said = await refusal(client, metadata)
            assert ((code, reason), said) == (status, message)
        assert not vllm.chats
        too_long = await refusal(client, issuer.metadata("a" * 257))
        assert too_long[:2] == unauthenticated
        assert "the proxy does not name this caller" in too_long[2]
        assert not vllm.chats
        await client.chat.create("hi", model=MODEL, metadata=issuer.metadata())
    (chat,) = vllm.chats
    assert not {"authorization", "x-deltawire-caller"} & {name.lower() for name in chat.headers}


async def test_limits_and_completions_are_those_of_the_subject(vllm: FakeVllm, tmp_path: Path, issuer: Issuer) -> None:
    """On a gateway without access lines: a header or a key that the caller sends makes it nobody else."""
    vllm.play(ENDLESS)
    key: Metadata = (("x-deltawire-key", KEY),)
    async with (
        checked(vllm, tmp_path, issuer, "--set", "limits.streams=1") as (_, client),
        asyncio.timeout(LIMIT),
        client.chat.stream("hi", model=MODEL, completion_id="mine", metadata=issuer.metadata("ann")) as stream,
    ):
        await anext(aiter(stream))
        more: Metadata
        for more in ((), (("x-deltawire-caller", "bob"),), key):
            code, reason, _ = await refusal(client, issuer.metadata("ann") + more)
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALLER_LIMIT_EXCEEDED")
        bob = issuer.metadata("bob") + FORGED
        assert (await client.chat.create("hi", model=MODEL, metadata=bob)).text
        with pytest.raises(CompletionNotFoundError):
            await client.chat.get("mine", metadata=bob)
        await client.chat.get("mine", metadata=issuer.metadata("ann"))


async def test_access_lines_name_subjects(vllm: FakeVllm, tmp_path: Path, issuer: Issuer, lines: Lines) -> None:
    """Only these may call, with the permissions of their lines; a key in its own header counts instead of the token."""
    keys = tmp_path / "keys"
    keys.write_text(f"ann call proxy:ann\nbob read proxy:auth0|bob\nrobot call {KEY}\n")
    key: Metadata = (("x-deltawire-key", KEY),)
    async with checked(vllm, tmp_path, issuer, "--access-keys-file", str(keys)) as (envoy, client):
        for metadata in (issuer.metadata("ann"), issuer.metadata("eve") + key):
            assert (await client.chat.create("hi", model=MODEL, metadata=metadata)).text
        for subject, reason in (("auth0|bob", "PERMISSION_DENIED"), ("eve", "UNAUTHENTICATED")):
            assert (await refusal(client, issuer.metadata(subject) + FORGED))[1] == reason
        assert (await refusal(client, key))[2] == "Jwt is missing"
        assert callers(lines) == ["ann", "robot", "bob", None]
        # A load balancer in front of Envoy has no token.
        async with grpc.aio.insecure_channel(envoy.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_path_without_a_check_has_no_names(vllm: FakeVllm, tmp_path: Path, issuer: Issuer) -> None:
    """If the operator exempts a path, as the file does for health, the gateway refuses whoever names itself there."""
    keys = tmp_path / "keys"
    keys.write_text("ann call proxy:ann\n")
    async with checked(
        vllm, tmp_path, issuer, "--access-keys-file", str(keys), exempt="/deltawire.v1.ChatCompletion/"
    ) as (_, client):
        for metadata in ((), FORGED, issuer.metadata("ann")):
            code, _, said = await refusal(client, metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert "Jwt" not in said
    assert not vllm.chats


async def test_pages_and_curl_send_tokens_too(
    builds: Builds, vllm: FakeVllm, tmp_path: Path, issuer: Issuer, lines: Lines
) -> None:
    """With the filter in web.yaml: the page gets status and reason of a refusal, curl gets 401 and 403."""
    pages = await asyncio.to_thread(builds.result, "TypeScript")
    request = {"chat": {"messages": [{"user": {"text": "hi"}}]}}
    with serving(pages.folder / "page") as origin:
        async with checked(vllm, tmp_path, issuer, origin=re.escape(origin)) as (envoy, _):
            url = f"http://{envoy.web}"
            async with page(tmp_path, origin) as opened:
                for headers, error in (
                    ({}, ("Unauthenticated", "UNAUTHENTICATED", "Jwt is missing")),
                    (
                        dict(issuer.metadata(aud="another")),
                        ("PermissionDenied", "PERMISSION_DENIED", "Audiences in Jwt are not allowed"),
                    ),
                ):
                    refused = (await opened.call("chat", url, request, headers))["error"]
                    assert (refused["code"], refused["trailer"], refused["message"]) == error
                assert not vllm.chats
                reply = await opened.call("chat", url, request, dict(issuer.metadata("ann")))
                assert reply["error"] is None
            data = ("--header", "content-type: application/json", "--data", json.dumps(request))
            written = ("--silent", "--output", "/dev/null", "--write-out", "%{http_code} %header{deltawire-reason}")
            for metadata, status in (
                ((), "401 UNAUTHENTICATED"),
                (issuer.metadata(aud="another"), "403 PERMISSION_DENIED"),
                (issuer.metadata("curly") + FORGED, "200 "),
            ):
                sent = [flag for name, value in metadata for flag in ("--header", f"{name}: {value!s}")]
                path = f"{url}/deltawire.v1.ChatCompletion/StreamChatCompletion"
                assert (await run(tool("curl"), *written, *data, *sent, path, home=tmp_path)).out == status
    calls = [entry for entry in lines.entries if entry["event"] == "call" and "Stream" in entry["method"]]
    assert [entry["caller"] for entry in calls] == ["ann", "curly"]
