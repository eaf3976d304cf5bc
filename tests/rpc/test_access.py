"""Who may call, over gRPC: by key and by certificate, every RPC, what refusals and log lines say, and a change of it all."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deltawire import AsyncClient, Client, ModelChange, PermissionDeniedError, UnauthenticatedError, WatchBookmark
from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2, model_registry_pb2
from deltawire_server.access import NEEDS, Permission
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.support.gateway import (
    Failure,
    Lines,
    Running,
    ask,
    failure_of,
    kinds,
    read,
    read_badly,
    read_well,
    settings_of,
    taken_apart,
    until,
)
from tests.support.mutual_tls import connected, mutual
from tests.support.raw_http2 import message, raw_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire import AsyncModelWatch, WatchEvent
    from tests.conftest import Certificates, StartGateway

CHUNKS = Chunks()
KEYS = {permission: f"secret-of-{permission.value}-alone" for permission in Permission}
OPS = "secret-of-operations"
ACCESS = {"keys": "; ".join([f"ops all {OPS}", *(f"{each.value}er {each.value} {KEYS[each]}" for each in KEYS)])}
MESH = "spiffe://mesh/ns/frontend"
LIST = model_registry_pb2.ListProvidersRequest()


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata of somebody who has this key."""
    return (("authorization", f"Bearer {key}"),)


async def tried(channel: aio.Channel, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> Failure | None:
    """How a call with an empty request fails; `None` if it does not, or not before its first message."""
    if method.endswith(("/StreamChatCompletion", "/WatchModels")):
        stream: Any = channel.unary_stream(method)
        call = stream(b"", metadata=metadata)
        try:
            await call.read()
            call.cancel()
        except aio.AioRpcError as error:
            return taken_apart(error)
        return None
    unary: Any = channel.unary_unary(method)
    try:
        await unary(b"", metadata=metadata)
    except aio.AioRpcError as error:
        return taken_apart(error)
    return None


@pytest.mark.parametrize("method", NEEDS)
async def test_every_rpc_asks_for_its_permission(start_gateway: StartGateway, vllm: FakeVllm, method: str) -> None:
    """Without a key, with a wrong one and without the permission it is refused, else it is let in."""
    async with start_gateway(access=ACCESS) as gateway:
        for metadata in ((), bearer("secret-of-nobody-at-all")):
            failure = await tried(gateway.channel, method, metadata)
            assert failure is not None
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            assert "authorization: Bearer" in failure.message
            assert failure.initial == {}
        for permission, key in KEYS.items():
            failure = await tried(gateway.channel, method, bearer(key))
            if permission is NEEDS[method]:
                assert failure is None or failure.reason not in {"UNAUTHENTICATED", "PERMISSION_DENIED"}
                continue
            assert failure is not None
            assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            asked = {"caller": f"{permission.value}er", "needs": NEEDS[method].value}
            assert failure.metadata.items() >= asked.items()
        let_in = await tried(gateway.channel, method, bearer(OPS))
        assert let_in is None or let_in.reason not in {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    assert vllm.chats == []


async def test_known_callers_are_served(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """Unary and streamed; the log names the caller, and the key goes nowhere: not to vLLM and into no line."""
    async with start_gateway(access=ACCESS, provider={"api_token": "operators-token"}) as gateway:
        await read_well(gateway.stream(metadata=bearer(KEYS[Permission.CALL])))
        await gateway.create(metadata=bearer(OPS))
        await gateway.models.ListProviders(LIST, metadata=bearer(KEYS[Permission.READ]))
    calls = [entry for entry in lines.entries if entry["event"] == "call"]
    assert [(entry["caller"], entry["code"]) for entry in calls] == [("caller", "OK"), ("ops", "OK"), ("reader", "OK")]
    for chat in vllm.chats:
        assert chat.headers["authorization"] == "Bearer operators-token"
        assert not [value for value in chat.headers.values() if "secret-of" in value]
    assert "secret-of" not in lines.getvalue()


async def test_a_registration_has_an_owner(start_gateway: StartGateway) -> None:
    """The caller that registered it: not another that registers the same again or changes it, nor what a request says."""
    async with start_gateway(access=ACCESS) as gateway:
        request = model_registry_pb2.RegisterModelRequest(model_id="mine", provider_model_id="fake")
        changer = bearer(KEYS[Permission.CHANGE])
        models = [(await gateway.models.RegisterModel(request, metadata=each)).model for each in (changer, bearer(OPS))]
        update = model_registry_pb2.UpdateModelRequest(
            model=model_registry_pb2.Model(id="mine", aliases=["a"], owner="eve")
        )
        models.append((await gateway.models.UpdateModel(update, metadata=bearer(OPS))).model)
        read = model_registry_pb2.GetModelRequest(model_id="vllm/fake")
        listed = await gateway.models.ListModels(model_registry_pb2.ListModelsRequest(), metadata=bearer(OPS))
        models += [each for each in listed.models if each.id == "mine"]
        assert [model.owner for model in models] == ["changeer"] * 4
        await gateway.models.UnregisterModel(
            model_registry_pb2.UnregisterModelRequest(model_id="mine"), metadata=changer
        )
        assert (await gateway.models.GetModel(read, metadata=bearer(OPS))).model.owner == ""


async def test_only_its_owner_changes_a_registration_or_an_operator(start_gateway: StartGateway) -> None:
    """By any of its names, with its etag or without; the refusal names the owner and the permission, and nothing changes."""
    keys = f"{ACCESS['keys']}; second change secret-of-another-changer"
    mine, second, ops = bearer(KEYS[Permission.CHANGE]), bearer("secret-of-another-changer"), bearer(OPS)
    pb = model_registry_pb2
    async with start_gateway(access={"keys": keys}) as gateway:
        request = pb.RegisterModelRequest(model_id="mine", provider_model_id="fake", aliases=["a"])
        model = (await gateway.models.RegisterModel(request, metadata=mine)).model
        assert (await gateway.models.RegisterModel(request, metadata=second)).model == model
        notes = {"k": "v"}
        for name, etag in (("mine", ""), ("a", ""), ("mine", model.etag)):
            update = pb.UpdateModelRequest(model=pb.Model(id=name, etag=etag, annotations=notes))
            remove = pb.UnregisterModelRequest(model_id=name, etag=etag)
            for call in (
                gateway.models.UpdateModel(update, metadata=second),
                gateway.models.UnregisterModel(remove, metadata=second),
            ):
                failure = await failure_of(call)
                assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
                asked = {"caller": "second", "needs": "operate", "model": "mine", "owner": "changeer"}
                assert failure.metadata.items() >= asked.items()
                assert "'changeer' registered model 'mine', so second needs the permission operate" in failure.message
        read = pb.GetModelRequest(model_id="mine")
        assert (await gateway.models.GetModel(read, metadata=ops)).model == model
        update = pb.UpdateModelRequest(model=pb.Model(id="mine", annotations=notes))
        for each in (mine, ops):
            updated = (await gateway.models.UpdateModel(update, metadata=each)).model
            assert updated.owner == "changeer"
        await gateway.models.UnregisterModel(pb.UnregisterModelRequest(model_id="a"), metadata=ops)


async def test_a_registration_without_an_owner_needs_operate(start_gateway: StartGateway) -> None:
    """As an open gateway makes them, where every caller may change everything: once the gateway is closed, an operator does."""
    pb = model_registry_pb2
    async with start_gateway() as gateway:
        for name in ("one", "two"):
            await gateway.models.RegisterModel(pb.RegisterModelRequest(model_id=name, provider_model_id="fake"))
        await gateway.models.UnregisterModel(pb.UnregisterModelRequest(model_id="two"))
    async with start_gateway(access=ACCESS) as gateway:
        remove = pb.UnregisterModelRequest(model_id="one")
        failure = await failure_of(gateway.models.UnregisterModel(remove, metadata=bearer(KEYS[Permission.CHANGE])))
        assert failure.reason == "PERMISSION_DENIED"
        assert "no known caller registered model 'one'" in failure.message
        assert failure.metadata["owner"] == ""
        await gateway.models.UnregisterModel(remove, metadata=bearer(OPS))


async def test_who_is_refused_is_logged(start_gateway: StartGateway, lines: Lines) -> None:
    """Like any other failure, with the reason, and the caller if it is known; never with what it sent."""
    async with start_gateway(access=ACCESS) as gateway:
        await read_badly(gateway.stream())
        await read_badly(gateway.stream(metadata=bearer("secret-of-nobody-at-all")))
        await read_badly(gateway.stream(metadata=(("authorization", "secret-of-operations"),)))
        await read_badly(gateway.stream(metadata=bearer(KEYS[Permission.READ])))
    calls = [entry for entry in lines.entries if entry["event"] == "call"]
    assert [entry["reason"] for entry in calls] == ["UNAUTHENTICATED"] * 3 + ["PERMISSION_DENIED"]
    assert {entry["level"] for entry in calls} == {"info"}
    assert [entry.get("caller") for entry in calls] == [None, None, None, "reader"]
    assert calls[-1]["needs"] == "call"
    assert "secret-of" not in lines.getvalue()
    for key in (*KEYS.values(), OPS):
        assert hashlib.sha256(key.encode()).hexdigest() not in lines.getvalue()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ((("authorization", OPS),), "is not the word Bearer, a space and a key"),
        ((("authorization", f"Basic {OPS}"),), "is not the word Bearer"),
        ((*bearer(OPS), *bearer("secret-of-nobody-at-all")), "several authorization headers that differ"),
    ],
)
async def test_headers_that_are_no_bearer_key(
    start_gateway: StartGateway, metadata: tuple[tuple[str, str], ...], message: str
) -> None:
    """Are refused with what is wrong, and not repeated."""
    async with start_gateway(access=ACCESS) as gateway:
        failure = await failure_of(gateway.create(metadata=metadata))
    assert failure.reason == "UNAUTHENTICATED"
    assert message in failure.message
    assert "secret-of" not in str(failure)


@pytest.mark.parametrize("metadata", [(), bearer(OPS), (("authorization", "Basic x"),)])
async def test_without_access_nobody_is_asked(
    served: Running, lines: Lines, metadata: tuple[tuple[str, str], ...]
) -> None:
    """Nor is a header looked at, nor a caller named."""
    await read_well(served.stream(metadata=metadata))
    assert "caller" not in await lines.find("call")


async def test_who_may_not_call_learns_nothing_else(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Access is checked before admission, and admission before the request is received and validated."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    known = bearer(OPS)
    async with start_gateway(access=ACCESS, server={"max_streams": 1}) as gateway:
        messages = aiter(gateway.stream(metadata=known))
        await anext(messages)
        wrong = chat_pb.ChatRequest()
        assert (await failure_of(gateway.create(wrong, metadata=known))).reason == "TOO_MANY_STREAMS"
        assert (await failure_of(gateway.create(wrong))).reason == "UNAUTHENTICATED"
        assert (await failure_of(gateway.create(metadata=known))).reason == "TOO_MANY_STREAMS"
        assert (await failure_of(gateway.create())).reason == "UNAUTHENTICATED"
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"


@pytest.mark.usefixtures("late_requests")
async def test_health_and_reflection_are_open(start_gateway: StartGateway) -> None:
    """Meshes ask the one, tools the other, and neither has a key."""
    async with start_gateway(access=ACCESS) as gateway:
        response = await health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        call: Any = gateway.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (answer,) = [each async for each in call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))]
        assert "deltawire.v1.ModelRegistry" in [each.name for each in answer.list_services_response.service]


@pytest.mark.parametrize(
    ("identity", "common_name", "alternative_names"),
    [
        (f"uri:{MESH}", "by-uri", f"URI:{MESH}"),
        (f"uri:{MESH}", "by-second-uri", f"email:a@b.example,URI:https://other,URI:{MESH}"),
        ("dns:frontend.mesh", "by-dns", f"URI:{MESH},DNS:frontend.mesh"),
        ("cn:by-common-name", "by-common-name", ""),
    ],
)
async def test_by_certificate(
    start_gateway: StartGateway,
    certificates: Certificates,
    lines: Lines,
    identity: str,
    common_name: str,
    alternative_names: str,
) -> None:
    """By a URI, by a DNS name, or by the common name: unary and streamed, let in and refused, by the permission."""
    async with (
        start_gateway(server=mutual(certificates), access={"keys": f"frontend call mtls:{identity}"}) as gateway,
        connected(gateway, certificates, common_name, alternative_names) as caller,
    ):
        await read_well(caller.stream())
        await caller.create()
        failure = await failure_of(caller.models.ListProviders(LIST))
    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert failure.metadata.items() >= {"caller": "frontend", "needs": "read"}.items()
    assert [entry["caller"] for entry in lines.entries if entry["event"] == "call"] == ["frontend"] * 3


@pytest.mark.parametrize("alternative_names", ["DNS:stranger.mesh", ""])
async def test_a_certificate_that_is_not_known(
    start_gateway: StartGateway, certificates: Certificates, alternative_names: str
) -> None:
    """The authority's signature alone lets nobody in, and the refusal says what names there were."""
    async with (
        start_gateway(server=mutual(certificates), access={"keys": "frontend call mtls:dns:frontend.mesh"}) as gateway,
        connected(gateway, certificates, "stranger", alternative_names) as caller,
    ):
        failure = await failure_of(caller.create())
    assert failure.reason == "UNAUTHENTICATED"
    name = "mtls:dns:stranger.mesh" if alternative_names else "mtls:cn:stranger"
    assert f"no name of the caller ({name}) is authorized" in failure.message


async def test_a_common_name_does_not_count_beside_alternative_names(
    start_gateway: StartGateway, certificates: Certificates
) -> None:
    """Who has one signed for its own alternative name may have written any common name into it."""
    async with (
        start_gateway(server=mutual(certificates), access={"keys": "frontend call mtls:cn:frontend"}) as gateway,
        connected(gateway, certificates, "frontend", "DNS:stranger.mesh") as caller,
    ):
        assert (await failure_of(caller.create())).reason == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("identity", "alternative_names"),
    [
        ("uri:spiffe://mesh/ns/frontend", "DNS:spiffe://mesh/ns/frontend"),
        ("uri:spiffe://mesh/ns/frontend", "email:spiffe://mesh/ns/frontend"),
        ("dns:frontend.mesh", "email:frontend.mesh"),
        ("dns:frontend.mesh", "URI:frontend.mesh"),
        ("dns:192.0.2.1", "IP:192.0.2.1"),
        ("cn:known", "email:frontend@mesh"),
        ("cn:known", "IP:192.0.2.1"),
    ],
)
async def test_a_name_of_another_kind(
    start_gateway: StartGateway, certificates: Certificates, identity: str, alternative_names: str
) -> None:
    """An authority that lets a client choose its e-mail address or DNS name does not give it a SPIFFE id by that."""
    async with (
        start_gateway(server=mutual(certificates), access={"keys": f"frontend call mtls:{identity}"}) as gateway,
        connected(gateway, certificates, "known", alternative_names) as caller,
    ):
        assert (await failure_of(caller.create())).reason == "UNAUTHENTICATED"


async def test_key_and_certificate(start_gateway: StartGateway, certificates: Certificates, lines: Lines) -> None:
    """A key alone decides: it is enough beside an unknown certificate, and no known one makes up for a wrong key."""
    access = {"keys": f"frontend all mtls:uri:{MESH}; reader read {KEYS[Permission.READ]}"}
    async with start_gateway(server=mutual(certificates), access=access) as gateway:
        async with connected(gateway, certificates, "known", f"URI:{MESH}") as caller:
            await caller.models.ListProviders(LIST, metadata=bearer(KEYS[Permission.READ]))
            denied = await failure_of(caller.create(metadata=bearer(KEYS[Permission.READ])))
            assert (denied.reason, denied.metadata["caller"]) == ("PERMISSION_DENIED", "reader")
            wrong = await failure_of(caller.create(metadata=bearer("secret-of-nobody-at-all")))
            assert wrong.reason == "UNAUTHENTICATED"
            await caller.create()
        async with connected(gateway, certificates, "unknown", "DNS:stranger.mesh") as caller:
            await caller.models.ListProviders(LIST, metadata=bearer(KEYS[Permission.READ]))
    callers = [entry.get("caller") for entry in lines.entries if entry["event"] == "call"]
    assert callers == ["reader", "reader", None, "frontend", "reader"]


async def test_a_unix_socket_has_no_certificates(
    start_gateway: StartGateway, certificates: Certificates, tmp_path: Path
) -> None:
    """Beside a listener with mutual TLS, a key is what it takes there."""
    listen = {"listen": [f"unix:{tmp_path}/gateway.sock", "127.0.0.1:0"], **mutual(certificates)}
    async with start_gateway(server=listen, access={"keys": f"frontend all mtls:uri:{MESH}; ops all {OPS}"}) as gateway:
        assert (await failure_of(gateway.create())).reason == "UNAUTHENTICATED"
        await gateway.create(metadata=bearer(OPS))


async def test_access_is_loaded_anew(start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, lines: Lines) -> None:
    """From fresh settings, without a restart: a revoked key is refused, a new one taken."""
    keys = tmp_path / "keys"
    keys.write_text("old all secret-of-the-old\n")

    async with start_gateway(access={"keys_file": keys}) as gateway:
        keys.write_text("new call secret-of-the-new\n")
        assert (await failure_of(gateway.create(metadata=bearer("secret-of-the-new")))).reason == "UNAUTHENTICATED"

        await gateway.gateway.reload(settings_of(vllm.base_url, tmp_path, access={"keys_file": keys}))

        assert (await lines.find("access loaded"))["access"] == "keys: 1, mTLS identities: 0"
        revoked = await failure_of(gateway.create(metadata=bearer("secret-of-the-old")))
        assert revoked.reason == "UNAUTHENTICATED"
        assert "or was revoked" in revoked.message
        await gateway.create(metadata=bearer("secret-of-the-new"))
    assert "secret-of" not in lines.getvalue()


OLD = "secret-of-the-old"
BEFORE = f"ci all {OLD}; stays all {OPS}"
CHANGED = {
    "removed": f"stays all {OPS}",
    "another credential": f"ci all secret-of-the-new; stays all {OPS}",
    "another name": f"cj all {OLD}; stays all {OPS}",
    "without the permission": f"ci read,change {OLD}; stays all {OPS}",
}


@pytest.fixture
def gate(vllm: FakeVllm) -> asyncio.Event:
    """What every answer waits for, after its first word."""
    gate = asyncio.Event()
    script = Script.chunks([CHUNKS.role(), CHUNKS.text("one "), gate, CHUNKS.text("two"), CHUNKS.finish()])
    vllm.play(*[script] * 5)
    return gate


async def reload(gateway: Running, vllm: FakeVllm, folder: Path, keys: str, **access: str) -> None:
    """Have the gateway take over other lines."""
    await gateway.gateway.reload(settings_of(vllm.base_url, folder, access={"keys": keys, **access}))


@pytest.mark.parametrize("change", CHANGED)
async def test_a_revoked_caller_s_calls_end(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, gate: asyncio.Event, change: str
) -> None:
    """Plain and retained streams and whole answers, at once; what the engine generates for them too, but no other caller's."""
    old, ops = bearer(OLD), bearer(OPS)
    kept = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))
    async with start_gateway(access={"keys": BEFORE}) as gateway:
        revoked = [
            gateway.stream(metadata=old),
            gateway.stream(metadata=old, options=kept),
            gateway.stream(ask(completion_id="mine"), metadata=old),
        ]
        for call in revoked:
            assert [(await anext(aiter(call))).WhichOneof("event") for _ in range(2)] == ["started", "text_delta"]
        whole = asyncio.ensure_future(failure_of(gateway.create(metadata=old)))
        other = gateway.stream(metadata=ops)
        assert [(await anext(aiter(other))).WhichOneof("event") for _ in range(2)] == ["started", "text_delta"]
        await until(lambda: vllm.running == 5)

        await reload(gateway, vllm, tmp_path, CHANGED[change])

        for call in revoked:
            events, failure = await read(call)
            assert failure is not None
            assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "ACCESS_CHANGED")
            assert failure.message.startswith("the access of this caller")  # no provider is to blame
            assert kinds(events) == ["choice_finished", "completed"]
            assert events[-1].completed.error.reason == error_reason_pb2.ERROR_REASON_ACCESS_CHANGED
        assert (await whole).reason == "ACCESS_CHANGED"
        await until(lambda: vllm.running == 1)
        gate.set()
        assert kinds([event async for event in other]) == ["text_delta", "choice_finished", "completed"]


async def test_an_abandoned_retained_stream_of_a_revoked_caller_ends(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, gate: asyncio.Event
) -> None:
    """Which no call is about any more."""
    kept = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))
    async with start_gateway(access={"keys": BEFORE}) as gateway:
        call = gateway.stream(ask(completion_id="mine"), metadata=bearer(OLD), options=kept)
        await anext(aiter(call))
        call.cancel()
        await until(lambda: vllm.running == 1)
        await reload(gateway, vllm, tmp_path, f"stays all {OPS}")
        await until(lambda: vllm.running == 0)
        assert not gate.is_set()


async def test_a_call_that_waits_for_its_model_ends(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a call waits for, and whether or not a task of its own waits: it is not begun for a revoked caller."""
    monkeypatch.setattr("deltawire_server.app.REVOKED_SECONDS", 0.05)
    waits = asyncio.Event()

    async def resolve(*_: object) -> None:
        waits.set()
        await asyncio.Event().wait()

    async with start_gateway(access={"keys": BEFORE}) as gateway:
        monkeypatch.setattr(gateway.gateway._registry, "resolve", resolve)
        for chat in (ask(), ask(completion_id="mine")):
            waits.clear()
            await reload(gateway, vllm, tmp_path, BEFORE)
            failed = asyncio.ensure_future(failure_of(gateway.create(chat, metadata=bearer(OLD))))
            await waits.wait()
            await reload(gateway, vllm, tmp_path, f"stays all {OPS}")
            failure = await failed
            assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "ACCESS_CHANGED")
    assert not vllm.chats


async def test_a_request_that_arrives_late_generates_nothing_for_long(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, gate: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that was let in before its caller's access was revoked, and then begins a retained stream."""
    monkeypatch.setattr("deltawire_server.app.REVOKED_SECONDS", 1.0)
    kept = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))
    request = chat_pb.StreamChatCompletionRequest(chat=ask(completion_id="mine"), options=kept).SerializeToString()
    async with start_gateway(access={"keys": BEFORE}) as gateway, raw_client(gateway.address) as client:
        headers = ("authorization", f"Bearer {OLD}")
        stream = client.call("/deltawire.v1.ChatCompletion/StreamChatCompletion", headers)
        await until(lambda: len(gateway.gateway._calls._admitted._calls) == 1)
        await reload(gateway, vllm, tmp_path, f"stays all {OPS}")
        client.connection.send_data(stream, message(request), end_stream=True)
        client.flush()
        await until(lambda: vllm.running == 1)
        assert await client.status(stream) == str(grpc.StatusCode.ABORTED.value[0])
        assert client.headers(stream)["deltawire-reason"] == "ACCESS_CHANGED"
        await until(lambda: vllm.running == 0)
        assert not gate.is_set()


async def test_a_request_that_does_not_arrive_is_not_awaited(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a caller whose access was revoked."""
    monkeypatch.setattr("deltawire_server.app.REVOKED_SECONDS", 0.05)
    async with start_gateway(access={"keys": BEFORE}) as gateway, raw_client(gateway.address) as client:
        headers = ("authorization", f"Bearer {OLD}")
        stream = client.call("/deltawire.v1.ChatCompletion/StreamChatCompletion", headers)
        await until(lambda: len(gateway.gateway._calls._admitted._calls) == 1)
        await reload(gateway, vllm, tmp_path, f"stays all {OPS}")
        assert await client.status(stream) == str(grpc.StatusCode.ABORTED.value[0])
        assert client.headers(stream)["deltawire-reason"] == "ACCESS_CHANGED"


async def test_calls_may_finish(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, gate: asyncio.Event
) -> None:
    """With access.revoke = "finish", to their good end."""
    async with start_gateway(access={"keys": BEFORE, "revoke": "finish"}) as gateway:
        under_way = gateway.stream(metadata=bearer(OLD))
        await anext(aiter(under_way))
        await reload(gateway, vllm, tmp_path, f"stays all {OPS}", revoke="finish")
        gate.set()
        assert kinds([event async for event in under_way])[-1] == "completed"


async def test_a_permission_more_ends_nothing(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path, gate: asyncio.Event
) -> None:
    """Nor does one less that the call does not need."""
    async with start_gateway(access={"keys": f"ci call,read {OLD}"}) as gateway:
        under_way = gateway.stream(metadata=bearer(OLD))
        await anext(aiter(under_way))
        await reload(gateway, vllm, tmp_path, f"ci all {OLD}; stays all {OPS}")
        await reload(gateway, vllm, tmp_path, f"stays all {OPS}; ci call {OLD}")
        gate.set()
        assert kinds([event async for event in under_way])[-1] == "completed"


async def test_a_name_that_is_given_to_another_credential_inherits_nothing(
    start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path
) -> None:
    """Neither a retained stream nor what is remembered of a completion nor its id; the credential's own line finds them again."""
    kept = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))
    new = bearer("secret-of-the-new")
    async with start_gateway(access={"keys": BEFORE}) as gateway:
        await read_well(gateway.stream(ask(completion_id="kept"), metadata=bearer(OLD), options=kept))
        await read_well(gateway.stream(ask(completion_id="over"), metadata=bearer(OLD)))
        await reload(gateway, vllm, tmp_path, CHANGED["another credential"])
        for completion_id in ("kept", "over"):
            assert (await failure_of(gateway.look_up(completion_id, metadata=new))).reason == "COMPLETION_NOT_FOUND"
            _, failure = await read(gateway.resume(completion_id, metadata=new))
            assert failure is not None
            assert failure.reason == "COMPLETION_NOT_FOUND"
        await read_well(gateway.stream(ask("another", completion_id="kept"), metadata=new))
        await reload(gateway, vllm, tmp_path, BEFORE)
        await read_well(gateway.resume("kept", metadata=bearer(OLD)))
        assert (await gateway.look_up("over", metadata=bearer(OLD))).state == chat_pb.COMPLETION_STATE_COMPLETED


async def test_a_watch_ends_with_its_key(start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path) -> None:
    """When the keys change every watch is judged anew: the client's goes on by itself, or is told why it may not."""
    keys = tmp_path / "keys"
    keys.write_text(f"stays all {OPS}\ngoes read secret-of-the-old\n")
    async with (
        start_gateway(access={"keys_file": keys}) as gateway,
        AsyncClient(gateway.address, token=OPS) as stays,
        AsyncClient(gateway.address, token="secret-of-the-old") as goes,
        stays.models.watch() as good,
        goes.models.watch() as revoked,
    ):
        async with asyncio.timeout(30):
            for watch in (good, revoked):
                while not isinstance(await anext(watch), WatchBookmark):
                    pass
            keys.write_text(f"stays all {OPS}\n")
            await gateway.gateway.reload(settings_of(vllm.base_url, tmp_path, access={"keys_file": keys}))
            with pytest.raises(UnauthenticatedError):
                _ = [event async for event in _until(revoked, "nothing more")]
            await stays.models.register("mine", provider_model_id="fake")
            changes = [event async for event in _until(good, "mine")]
    assert [change.model.id for change in changes if isinstance(change, ModelChange)][-1] == "mine"


async def _until(watch: AsyncModelWatch, model_id: str) -> AsyncIterator[WatchEvent]:
    """The events of a watch up to the one about this model."""
    async for event in watch:
        yield event
        if isinstance(event, ModelChange) and event.model.id == model_id:
            return


async def test_the_client_sends_its_token(start_gateway: StartGateway) -> None:
    """Both Python clients' `token` is the key, and their errors are those of this table."""
    async with start_gateway(access=ACCESS) as gateway:
        async with AsyncClient(gateway.address, token=KEYS[Permission.CALL]) as client:
            answer = await client.chat.create("hi", model="fake")
            assert answer.text
            with pytest.raises(PermissionDeniedError, match="caller lacks the permission read"):
                await client.models.get("fake")
        async with AsyncClient(gateway.address, token=OPS, token_header="x-deltawire-key") as client:
            assert (await client.chat.create("hi", model="fake")).text
        async with AsyncClient(gateway.address) as client:
            with pytest.raises(UnauthenticatedError, match="send a key as"):
                await client.chat.create("hi", model="fake")

        def blocking() -> str:
            with Client(gateway.address, token=OPS) as client:
                return client.chat.create("hi", model="fake").text

        assert await asyncio.to_thread(blocking)


async def test_a_stream_is_refused_before_it_begins(start_gateway: StartGateway) -> None:
    """Not one message, and a bare status."""
    async with start_gateway(access=ACCESS) as gateway:
        events, failure = await read(gateway.stream())
    assert events == []
    assert failure is not None
    assert failure.retry_seconds is None
