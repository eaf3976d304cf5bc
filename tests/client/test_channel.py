"""Where calls go and what they bear: targets, channel options, tokens, request ids."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deltawire import CallInfo, Client, ConnectOptions, tls_credentials
from deltawire._channel import GATEWAY, ROUTE, SERVICE_CONFIG, Defaults, Outgoing, connection, is_local

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.client.scripted import Gateway
    from tests.conftest import Certificates


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:50051",
        "127.8.9.10:1",
        "localhost:50051",
        "LOCALHOST",
        "[::1]:50051",
        "::1",
        "unix:/run/deltawire.sock",
        "unix:///run/deltawire.sock",
        "unix-abstract:deltawire",
        "dns:localhost:50051",
        "dns:///localhost:50051",
        "ipv4:127.0.0.1:50051,127.0.0.2:50051",
        "ipv6:[::1]:50051",
    ],
)
def test_this_machine(target: str) -> None:
    """Unix sockets and the loopback interface, however they are written."""
    assert is_local(target)


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:50051",
        "gateway:50051",
        "localhost.example.com:50051",
        "[2001:db8::1]:50051",
        "2001:db8::1",
        "dns:///gateway:50051",
        "dns://8.8.8.8/localhost:50051",
        "ipv4:127.0.0.1:50051,10.0.0.1:50051",
        "xds:///localhost",
        "0.0.0.0:50051",
        "",
    ],
)
def test_other_machines(target: str) -> None:
    """One address elsewhere is enough, and so is one that cannot be judged."""
    assert not is_local(target)


def made(target: str = "127.0.0.1:1", **options: Any) -> tuple[dict[str, Any], Defaults]:  # noqa: ANN401
    """Channel options and call defaults for a client made so."""
    end, defaults = connection(target, options, own_channel=False)  # type: ignore[arg-type]
    return dict(end.options), defaults


def bears(defaults: Defaults, **options: Any) -> dict[str, str | bytes]:  # noqa: ANN401
    """The metadata of a call."""
    return dict(defaults.outgoing(options).arguments["metadata"])  # type: ignore[arg-type]


def test_channel_options() -> None:
    """Keepalive without an end, room for long answers, and no proxy between here and here."""
    options, _ = made()
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.http2.max_pings_without_data"] == 0
    assert options["grpc.max_reconnect_backoff_ms"] == 10_000
    assert options["grpc.max_receive_message_length"] == 64 * 1024 * 1024
    assert options["grpc.enable_http_proxy"] == 0
    assert "grpc.enable_http_proxy" not in made("gateway:1")[0]


def test_the_callers_channel_options_win() -> None:
    """They come last, and gRPC takes the last."""
    options, _ = made(options=[("grpc.keepalive_time_ms", 5)], max_receive_bytes=7)
    assert options["grpc.keepalive_time_ms"] == 5
    assert options["grpc.max_receive_message_length"] == 7


def test_what_is_retried() -> None:
    """At most four attempts, on both services; a watch tries again by itself, so gRPC does not."""
    config, watch = json.loads(SERVICE_CONFIG)["methodConfig"]
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert config["retryPolicy"]["maxAttempts"] == 4
    assert {each["service"] for each in config["name"]} == {"deltawire.v1.ChatCompletion", "deltawire.v1.ModelRegistry"}
    assert watch == {"name": [{"service": "deltawire.v1.ModelRegistry", "method": "WatchModels"}]}


def test_tokens() -> None:
    """The gateway's as a bearer token, vLLM's in its own header."""
    _, defaults = made(token="key")
    metadata = bears(defaults, vllm_token="other")
    assert metadata["authorization"] == "Bearer key"
    assert metadata["x-vllm-api-token"] == "other"
    assert "authorization" not in bears(made()[1])


def test_a_token_in_its_own_header() -> None:
    """Alone, so that `authorization` can be for a proxy."""
    _, defaults = made(token="key", token_header="x-deltawire-key", metadata=[("authorization", "Bearer a.b.c")])
    metadata = bears(defaults)
    assert (metadata["x-deltawire-key"], metadata["authorization"]) == ("key", "Bearer a.b.c")
    assert "authorization" not in bears(made(token="key", token_header="x-deltawire-key")[1])
    with pytest.raises(ValueError, match="token_header: 'x-key' is neither 'authorization' nor 'x-deltawire-key'"):
        made(token_header="x-key")


@pytest.mark.parametrize(
    "options",
    [
        {"token": "key"},
        {"token": "key", "token_header": "x-deltawire-key"},
        {"metadata": [("Authorization", "Bearer key")]},
        {"metadata": [("x-vllm-api-token", "key")]},
    ],
)
def test_tokens_stay_off_plaintext(options: dict[str, Any]) -> None:
    """Whichever way they come in, and before anything is connected."""
    with pytest.raises(ValueError, match="use TLS, or allow it with insecure=True"):
        made("gateway:1", **options)
    for allowed in ({"insecure": True}, {"tls": True}, {"credentials": grpc.ssl_channel_credentials()}):
        made("gateway:1", **options, **allowed)


def test_tokens_of_a_call_stay_off_plaintext() -> None:
    """The rule holds for each call by itself."""
    _, defaults = made("gateway:1")
    with pytest.raises(ValueError, match="plaintext"):
        bears(defaults, vllm_token="key")
    assert "x-vllm-api-token" in bears(made("gateway:1", insecure=True)[1], vllm_token="key")


def test_request_ids() -> None:
    """The caller's own, by argument or by metadata, the argument first; else one is made up for each call."""
    _, defaults = made(metadata=[("x-request-id", "mine"), ("a", "b")])
    assert bears(defaults)["x-request-id"] == "mine"
    assert bears(defaults, request_id="this")["x-request-id"] == "this"
    again = defaults.outgoing({"request_id": "this"}).arguments["metadata"]
    assert [name for name, _ in again].count("x-request-id") == 1
    ids = {bears(made()[1])["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_arguments_of_a_call() -> None:
    """The call's own timeout before the client's; what was not said is not passed on."""
    _, defaults = made(timeout=9)
    assert defaults.outgoing({}).arguments["timeout"] == 9
    assert defaults.outgoing({"timeout": 1}).arguments["timeout"] == 1
    assert "wait_for_ready" not in defaults.outgoing({}).arguments
    assert defaults.outgoing({"wait_for_ready": False}).arguments["wait_for_ready"] is False
    assert bears(defaults, metadata=[("c", "d")])["c"] == "d"


def test_call_info_starts_clean() -> None:
    """One that is used again forgets the call before."""
    info = CallInfo("old", (("a", "b"),), (("c", "d"),))
    outgoing = made()[1].outgoing({"info": info, "request_id": "new"})
    assert outgoing.info is info
    assert info == CallInfo("new", (), ())


def test_misspelt_options_are_refused() -> None:
    """They would otherwise be lost in silence."""
    with pytest.raises(TypeError, match="a client has no argument tokn"):
        made(tokn="key")
    with pytest.raises(TypeError, match="a call has no argument timout"):
        made()[1].outgoing({"timout": 1})  # type: ignore[typeddict-unknown-key]


def test_a_channel_of_your_own_is_used_as_it_is() -> None:
    """So options for making one are refused, and tokens are the caller's affair."""
    options: ConnectOptions = {"tls": True, "options": []}
    with pytest.raises(ValueError, match="leave out options, tls"):
        connection("gateway:1", options, own_channel=True)
    _, defaults = connection("gateway:1", {"token": "key"}, own_channel=True)
    assert bears(defaults)["authorization"] == "Bearer key"


def test_tls_files(tmp_path: Path, certificates: Certificates) -> None:
    """A certificate needs its key, and a file that is not there is named."""
    with pytest.raises(ValueError, match="give both cert_file and key_file, or neither"):
        tls_credentials(cert_file="c.pem")
    with pytest.raises(FileNotFoundError):
        tls_credentials(ca_file=tmp_path / "ca.pem")
    pem = tmp_path / "all.pem"
    pem.write_text("no certificate")
    with pytest.raises(ValueError, match=r"all\.pem: not a certificate"):
        tls_credentials(ca_file=pem)
    credentials = tls_credentials(
        ca_file=certificates.authority, cert_file=certificates.client, key_file=certificates.client_key
    )
    with Client("gateway:1", credentials=credentials, token="key"):
        pass


@pytest.mark.parametrize("token", ["two words", "line\n", "geheimß"])
def test_a_token_that_fits_into_no_header(token: str) -> None:
    """Is refused when the client is made, or the call: gRPC would only say that some metadata is invalid."""
    with pytest.raises(ValueError, match=r"^the token must be printable ASCII") as caught:
        Client("127.0.0.1:1", token=token)
    assert token not in str(caught.value)
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(ValueError, match=r"^the vllm_token must be printable ASCII"),
    ):
        client.models.get("m", vllm_token=token)


@pytest.mark.parametrize(("target", "what"), [(" ", "is empty"), ("https://gateway:1/", "is a URL: write gateway:1,")])
def test_what_is_no_target(target: str, what: str) -> None:
    """Is told at once, and what to write."""
    with pytest.raises(ValueError, match=what):
        Client(target)


def test_a_models_metadata_is_not_a_calls() -> None:
    """The likeliest mix-up is told as such."""
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="a model's notes are annotations"):
        client.models.register("m", metadata={"owner": "we"})  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 2**63])
def test_timeouts_that_no_call_can_keep(timeout: float, gateway: Gateway, client: Client) -> None:
    """They are refused before anything is sent, for one call as for all of a client's."""
    calls: list[Callable[[], object]] = [
        lambda: Client(gateway.target, timeout=timeout),
        lambda: client.models.get("llama", timeout=timeout),
        lambda: client.models.watch(timeout=timeout),
        lambda: client.chat.create("hi", timeout=timeout),
        lambda: client.chat.stream("hi", timeout=timeout),
        lambda: client.chat.resume("mine", timeout=timeout),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^timeout: {timeout} is not a number of seconds above 0 and"):
            call()
    assert gateway.calls == []


@pytest.mark.parametrize("timeout", ["5", True])
def test_timeouts_of_another_type(timeout: Any, client: Client) -> None:  # noqa: ANN401
    """The message says what is needed."""
    with pytest.raises(TypeError, match=r"^timeout: a number of seconds is needed, not (str|bool)$"):
        client.models.watch(timeout=timeout)


def routing(outgoing: Outgoing) -> dict[str, str | bytes]:
    """The headers by which a proxy finds a completion's gateway."""
    return {name: value for name, value in outgoing.arguments["metadata"] if name in {ROUTE, GATEWAY}}


def test_a_call_about_a_completion_names_its_gateway() -> None:
    """By the id from the first call on, and by what the proxy has said of the gateway once there are headers."""
    _, defaults = made()
    outgoing = defaults.outgoing({})
    assert routing(outgoing) == {}
    assert routing(outgoing.about("mine")) == {ROUTE: "mine"}
    outgoing.began([(GATEWAY, "R0E=")])
    assert routing(outgoing.aside(1.0).about("mine")) == {ROUTE: "mine", GATEWAY: "R0E="}
    assert routing(outgoing.aside(1.0)) == {}


def test_a_client_remembers_the_gateway_of_a_completion() -> None:
    """Calls about it name the gateway, but not a call that begins another one with the same id."""
    _, defaults = made()
    generated = defaults.outgoing({}).about("", begins=True)
    generated.began([(GATEWAY, "R0E=")])
    generated.found("cmpl-1")
    assert routing(defaults.outgoing({}).about("cmpl-1")) == {ROUTE: "cmpl-1", GATEWAY: "R0E="}
    defaults.outgoing({}).about("mine", begins=True).began([(GATEWAY, "R0I=")])
    assert routing(defaults.outgoing({}).about("mine")) == {ROUTE: "mine", GATEWAY: "R0I="}
    assert routing(defaults.outgoing({}).about("mine", begins=True)) == {ROUTE: "mine"}
    assert routing(defaults.outgoing({}).about("mine", 1)) == {ROUTE: "mine#1"}
    _, others = made()
    assert routing(others.outgoing({}).about("mine")) == {ROUTE: "mine"}


def test_only_the_newest_completions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a client's memory is bounded."""
    monkeypatch.setattr("deltawire._channel.MAX_GATEWAYS", 2)
    _, defaults = made()
    for completion_id in ("a", "b", "c"):
        defaults.outgoing({}).about(completion_id, begins=True).began([(GATEWAY, "R0E=")])
    assert [defaults.gateways.of(completion_id) for completion_id in ("a", "b", "c")] == ["", "R0E=", "R0E="]


def test_an_attempt_elsewhere_has_another_route() -> None:
    """The gateway that does not have the completion is not named again."""
    _, defaults = made()
    outgoing = defaults.outgoing({}).about("mine")
    outgoing.began([(GATEWAY, "R0E=")])
    outgoing.about("mine").elsewhere(1)
    assert routing(outgoing) == {ROUTE: "mine#1"}
    outgoing.elsewhere(2)
    assert routing(outgoing) == {ROUTE: "mine#2"}


def test_the_callers_own_route_is_kept() -> None:
    """If the caller routes its calls by its own header, that header is sent with all attempts."""
    _, defaults = made(metadata=[("X-Deltawire-Route", "team-a")])
    outgoing = defaults.outgoing({}).about("mine")
    outgoing.elsewhere(1)
    assert [value for name, value in outgoing.arguments["metadata"] if name.lower() == ROUTE] == ["team-a"]


@pytest.mark.parametrize("completion_id", ["with space", "ä", "a\nb", ""])
def test_an_id_that_fits_into_no_header_has_no_route(completion_id: str) -> None:
    """The gateway refuses it, with a message that names the field."""
    _, defaults = made()
    assert routing(defaults.outgoing({}).about(completion_id)) == {}
