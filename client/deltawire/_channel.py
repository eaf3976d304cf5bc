"""How a call reaches the gateway: target, credentials, channel options, and the metadata of each call.

Nothing here waits, so both clients share it. Each client creates its own channel, from an `Endpoint`.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import grpc

from deltawire._errors import CallError, error_for
from deltawire._failure import REQUEST_ID, ClosedCall, FailedCall, Failure, failure_of
from deltawire._metadata import CallInfo, Metadata, metadata_of, metadata_text
from deltawire._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

DEFAULT_TARGET = "127.0.0.1:50051"
# A whole answer with log-probabilities passes gRPC's default of 4 MiB.
DEFAULT_MAX_RECEIVE_BYTES = 64 * 1024 * 1024
# Seconds, thirty years. Far beyond, gRPC's clock overflows, and a call fails at once as if its timeout had passed.
MAX_TIMEOUT = 10**9

AUTHORIZATION = "authorization"
OWN_HEADER = "x-deltawire-key"
VLLM_TOKEN = "x-vllm-api-token"  # noqa: S105 -- the name of a header
SECRETS = frozenset({AUTHORIZATION, OWN_HEADER, VLLM_TOKEN})
# Headers by which a proxy finds the gateway that has a completion, as the shipped Envoy does. Calls with the same route go to
# the same gateway; the other one comes from the proxy, names the gateway, and is sent back.
ROUTE = "x-deltawire-route"
GATEWAY = "x-deltawire-gateway"
# Completions of which a client remembers the gateway: those that a busy program may still look up or end.
MAX_GATEWAYS = 10_000

# gRPC itself retries, and only while no message has come, so nothing is ever seen twice. UNAVAILABLE says that nothing
# of the answer was sent; the engine may have begun all the same. Waits: about 0.2, 0.4 and 0.8 s, randomized.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "deltawire.v1.ChatCompletion"}, {"service": "deltawire.v1.ModelRegistry"}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    # CANCELLED is what a call gets that arrives as a gateway closes its connections; a caller's own cancel ends
                    # the call whatever stands here.
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            },
            # The client itself resumes a watch.
            {"name": [{"service": "deltawire.v1.ModelRegistry", "method": "WatchModels"}]},
        ]
    }
)


class CallOptions(TypedDict, total=False):
    """The options of every call.

    `timeout` is in seconds, above 0 and up to 10⁹, over all attempts; None means the client's own. `metadata` is sent
    besides the client's own, as (key, value) pairs. `wait_for_ready` waits for a gateway that cannot be reached yet instead
    of failing. `request_id` is the call's id in logs, in printable ASCII; by default it is generated. `vllm_token` is the
    caller's own token for vLLM. `info` is filled when the call has succeeded.
    """

    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]] | None
    wait_for_ready: bool | None
    request_id: str | None
    vllm_token: str | None
    info: CallInfo | None


class ConnectOptions(TypedDict, total=False):
    """The keyword arguments of both clients.

    `token` is the caller's key for the gateway, and `token_header` how it is sent: by default as `authorization: Bearer …`; as
    "x-deltawire-key" if a proxy in between has another use for that header, such as a JWT in `metadata`. `tls` uses TLS with
    the root certificates of gRPC; for others, pass `credentials`, see `tls_credentials`. `insecure` allows tokens over
    plaintext to other machines. `options` are gRPC channel options and override the client's own. `max_receive_bytes` is the
    largest message, by default 64 MiB. `timeout` (seconds above 0) and `metadata` are for every call.
    """

    token: str | None
    token_header: Literal["authorization", "x-deltawire-key"]
    tls: bool
    credentials: grpc.ChannelCredentials | None
    insecure: bool
    options: Sequence[tuple[str, Any]]
    max_receive_bytes: int
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]


CALL_OPTIONS = frozenset(CallOptions.__annotations__)
CONNECT_OPTIONS = frozenset(ConnectOptions.__annotations__)
# Those that only make sense for a channel that the client makes.
CHANNEL_OPTIONS = frozenset({"tls", "credentials", "insecure", "options", "max_receive_bytes"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the gateway is and how to talk to it; `credentials` None means plaintext."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]

    @property
    def apart(self) -> Endpoint:
        """The same endpoint for a channel with connections of its own.

        gRPC otherwise shares one connection among all channels with the same target, credentials and options.
        """
        return replace(self, options=(*self.options, ("grpc.use_local_subchannel_pool", 1)))

    @property
    def keeps_secrets(self) -> bool:
        """Whether a token can be sent without others on the network reading it."""
        return self.credentials is not None or is_local(self.target)


def connection(target: str, options: ConnectOptions, *, own_channel: bool) -> tuple[Endpoint, Defaults]:
    """What a client's channel is made from, and what its calls have in common.

    Raises:
        TypeError: An option does not exist.
        ValueError: A channel was given together with options for one, the target, the timeout or the token's header is invalid,
            or a token cannot be sent or would be sent over plaintext to another machine.
    """
    _known(options, CONNECT_OPTIONS, "a client")
    if own_channel and (surplus := options.keys() & CHANNEL_OPTIONS):
        message = f"a channel of your own is used unchanged: leave out {', '.join(sorted(surplus))}"
        raise ValueError(message)
    if not own_channel:
        _check_target(target)
    credentials = options.get("credentials")
    if credentials is None and options.get("tls"):
        credentials = grpc.ssl_channel_credentials()
    max_receive_bytes = options.get("max_receive_bytes", DEFAULT_MAX_RECEIVE_BYTES)
    # Channel options given by the caller come last, so they win.
    end = Endpoint(target, credentials, (*_options(target, max_receive_bytes), *options.get("options", ())))
    return end, Defaults(
        token=options.get("token"),
        token_header=options.get("token_header", AUTHORIZATION),
        metadata=metadata_of(options.get("metadata")),
        timeout=options.get("timeout"),
        secrets=own_channel or end.keeps_secrets or options.get("insecure", False),
    )


def tls_credentials(
    *, ca_file: str | Path | None = None, cert_file: str | Path | None = None, key_file: str | Path | None = None
) -> grpc.ChannelCredentials:
    """TLS from PEM files.

    Args:
        ca_file: The trusted root certificates. None means those of gRPC.
        cert_file: The caller's own certificate, if the gateway requires one.
        key_file: Its key, unencrypted.

    Raises:
        ValueError: Only one of certificate and key is given, or a file does not contain them. The message names the argument.
        OSError: A file cannot be read.

    Pass it to `credentials=`.
    """
    if (cert_file is None) != (key_file is None):
        message = "a certificate and its key go together: give both cert_file and key_file, or neither"
        raise ValueError(message)
    from pathlib import Path

    ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (ca_file, key_file, cert_file))
    if ca_file is not None:
        _check_ca(ca_file)
    if cert_file is not None and key_file is not None:
        _check_pair(cert_file, key_file)
    return grpc.ssl_channel_credentials(ca, key, cert)


def _check_ca(path: str | Path) -> None:
    """Check a file of root certificates. gRPC fails only when it connects, and without the name of the file."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        message = f"ca_file {path}: not a certificate in PEM"
        raise ValueError(message) from error


def _check_pair(cert_path: str | Path, key_path: str | Path) -> None:
    """Check a certificate and its key. The key may not be encrypted."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Only form and match are checked: the gateway decides whether a key is long enough.
    context.set_ciphers("ALL:@SECLEVEL=0")
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert_path, key_path, password="")
    except ssl.SSLError as error:
        message = f"cert_file {cert_path}, key_file {key_path}: not a certificate in PEM and its key, unencrypted"
        raise ValueError(message) from error


def is_local(target: str) -> bool:
    """Whether all of a gRPC target's addresses are this machine: a Unix socket or the loopback interface."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in {"unix", "unix-abstract"}:
        return True
    if colon and scheme in {"dns", "ipv4", "ipv6"}:
        # "dns:///host:1" has an empty authority; with another one, that name server decides what the host means.
        target = rest.removeprefix("///")
    return all(_is_loopback(_host(address)) for address in target.split(","))


class Gateways:
    """Which gateway has which completion, as far as a proxy has named it in the headers of a client's calls."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()

    def found(self, completion_id: str, gateway: str) -> None:
        """Remember it; no effect if the id is not known yet, or no proxy has named it."""
        if completion_id and gateway and self._names.get(completion_id) != gateway:
            self._names.pop(completion_id, None)
            self._names[completion_id] = gateway
            if len(self._names) > MAX_GATEWAYS:
                self._names.popitem(last=False)

    def of(self, completion_id: str) -> str:
        """Its name; "" if it is not known."""
        return self._names.get(completion_id, "")


@dataclass(slots=True)
class Outgoing:
    """One call: its arguments, and afterwards what was received beside its result."""

    arguments: dict[str, Any]
    info: CallInfo = field(default_factory=CallInfo)
    gateways: Gateways = field(default_factory=Gateways)
    _completion_id: str = ""
    _given: Metadata = field(init=False)

    def __post_init__(self) -> None:
        self._given = self.arguments["metadata"]

    def about(self, completion_id: str, attempt: int = 0, *, begins: bool = False) -> Outgoing:
        """Let a proxy send the call to the gateway that has a completion. Headers of the caller's own take precedence.

        Args:
            completion_id: "" if it is not known yet. One that cannot be sent in a header is left to the gateway to refuse.
            attempt: How many gateways did not have it; the proxy chooses again for each.
            begins: Whether the call begins a completion. Then an earlier one of the same id does not matter, whose gateway may be
                about to shut down.
        """
        self._completion_id = completion_id
        routing = {}
        if completion_id and all("!" <= character <= "~" for character in completion_id):
            routing[ROUTE] = f"{completion_id}#{attempt}" if attempt else completion_id
        gateway = metadata_text(self.info.initial_metadata, GATEWAY)
        if not gateway and not begins:
            gateway = self.gateways.of(completion_id)
        if not attempt and gateway:
            routing[GATEWAY] = gateway
        names = {name.lower() for name, _ in self._given}
        self.arguments["metadata"] = (*self._given, *(pair for pair in routing.items() if pair[0] not in names))
        return self

    def elsewhere(self, attempt: int) -> None:
        """Let the next attempt, 1 or above, go to another gateway."""
        self.about(self._completion_id, attempt)

    def began(self, initial: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Take the headers, as soon as they are received."""
        self.info.initial_metadata = metadata_of(initial)
        self.info.request_id = metadata_text(self.info.initial_metadata, REQUEST_ID) or self.info.request_id
        self.found(self._completion_id)

    def found(self, completion_id: str) -> None:
        """Remember the gateway that sent the headers: it has this completion."""
        self.gateways.found(completion_id, metadata_text(self.info.initial_metadata, GATEWAY))

    def ended(self, trailing: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Take the trailers of a call that succeeded."""
        self.info.trailing_metadata = metadata_of(trailing)

    def failure(self, call: FailedCall) -> Failure:
        """What a failed call says; the headers of a stream that had begun are known already."""
        failure = failure_of(call, self.info.request_id)
        self.info.request_id = failure.request_id
        self.info.initial_metadata = failure.initial_metadata or self.info.initial_metadata
        self.info.trailing_metadata = failure.trailing_metadata
        return failure

    def cancelled(self, *, is_closed: bool) -> Failure:
        """The end of a stream that this program canceled, or whose client it closed."""
        if is_closed:
            return self.failure(ClosedCall())
        return Failure(
            grpc.StatusCode.CANCELLED,
            "cancelled by the caller",
            request_id=self.info.request_id,
            initial_metadata=self.info.initial_metadata,
        )

    def aside(self, timeout: float | None) -> Outgoing:
        """Another call about this one's completion: with the same metadata, and so with the same request id."""
        arguments = self.arguments | {"timeout": timeout, "metadata": self._given}
        return Outgoing(arguments, CallInfo(self.info.request_id, self.info.initial_metadata), self.gateways)

    def error(self, call: FailedCall) -> CallError:
        """The error to raise for a failed call."""
        return error_for(self.failure(call))


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a client's calls have in common. `secrets` says whether a token may be sent at all."""

    token: str | None
    metadata: Metadata
    timeout: float | None
    secrets: bool
    token_header: str = AUTHORIZATION
    gateways: Gateways = field(default_factory=Gateways)

    def __post_init__(self) -> None:
        if self.token_header not in {AUTHORIZATION, OWN_HEADER}:
            message = f"token_header: {self.token_header!r} is neither {AUTHORIZATION!r} nor {OWN_HEADER!r}"
            raise ValueError(message)
        self.outgoing({})

    def outgoing(self, options: CallOptions) -> Outgoing:
        """Begin a call.

        Raises:
            TypeError: An option does not exist, the metadata is a mapping, or the timeout is not a number.
            ValueError: A token or a request id cannot be sent, a token would be sent over plaintext to another machine, or
                the timeout is out of range.
        """
        _known(options, CALL_OPTIONS, "a call")
        given = options.get("metadata") or ()
        if isinstance(given, Mapping):
            message = "metadata is gRPC metadata, (key, value) pairs; a model's notes are annotations"
            raise TypeError(message)
        metadata = [*self.metadata, *given]
        if self.token:
            token = _sendable(self.token, "token")
            metadata.append((self.token_header, f"Bearer {token}" if self.token_header == AUTHORIZATION else token))
        if vllm_token := options.get("vllm_token"):
            metadata.append((VLLM_TOKEN, _sendable(vllm_token, "vllm_token")))
        if not self.secrets and any(name.lower() in SECRETS for name, _ in metadata):
            message = (
                "a token would go over plaintext to another machine, where others can read it: "
                "use TLS, or allow it with insecure=True"
            )
            raise ValueError(message)
        # An id made here lets a call without a response be found in the gateway's log.
        sent = metadata_text(tuple(metadata), REQUEST_ID)
        if not sent or options.get("request_id"):
            sent = _sendable_id(options.get("request_id") or os.urandom(16).hex())
            metadata = [(name, value) for name, value in metadata if name != REQUEST_ID]
            metadata.append((REQUEST_ID, sent))
        timeout = checked_timeout(options.get("timeout"))
        arguments: dict[str, Any] = {
            "metadata": tuple(metadata),
            "timeout": checked_timeout(self.timeout) if timeout is None else timeout,
        }
        if (wait_for_ready := options.get("wait_for_ready")) is not None:
            arguments["wait_for_ready"] = wait_for_ready
        info = options.get("info") or CallInfo()
        info.request_id, info.initial_metadata, info.trailing_metadata = sent, (), ()
        return Outgoing(arguments, info, self.gateways)


def checked_timeout(timeout: float | None) -> float | None:
    """A call's timeout in seconds, unchanged.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0, or too long for gRPC.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        message = f"timeout: a number of seconds is needed, not {type(timeout).__name__}"
        raise TypeError(message)
    if not 0 < timeout <= MAX_TIMEOUT:
        message = f"timeout: {timeout} is not a number of seconds above 0 and up to {MAX_TIMEOUT}"
        raise ValueError(message)
    return timeout


def _check_target(target: str) -> None:
    """Refuse what gRPC would only fail at later, in words of its own."""
    if not target.strip():
        message = "the target is empty: write host:port or unix:/path"
        raise ValueError(message)
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in {"http", "https", "grpc", "grpcs"}:
        message = f"the target {target} is a URL: write {rest.rstrip('/')}, and ask for TLS separately"
        raise ValueError(message)


def _sendable(token: str, name: str) -> str:
    """A token, if it fits into a header; the message does not repeat it."""
    if not all("!" <= character <= "~" for character in token):
        message = f"the {name} must be printable ASCII without spaces or line ends, to be sent in a header"
        raise ValueError(message)
    return token


def _sendable_id(request_id: str) -> str:
    """A request id, if it fits into a header."""
    if not all(" " <= character <= "~" for character in request_id):
        message = f"the request_id must be printable ASCII, to be sent in a header: {request_id!r} is not"
        raise ValueError(message)
    return request_id


def _known(given: Mapping[str, object], known: frozenset[str], what: str) -> None:
    """Refuse misspelt names, which would otherwise be lost in silence."""
    if unknown := given.keys() - known:
        message = f"{what} has no argument {', '.join(sorted(unknown))}"
        raise TypeError(message)


def _options(target: str, max_receive_bytes: int) -> list[tuple[str, Any]]:
    """Channel options, each with its reason."""
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", SERVICE_CONFIG),
        ("grpc.max_receive_message_length", max_receive_bytes),
        # A stream can be silent for minutes while a long prompt is read; pings detect that the peer has disconnected,
        # and keep proxies from closing the connection. 0 means that they go on however long nothing else is sent.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # A gateway that was away for long is found soon after it is back; gRPC would let two minutes pass.
        ("grpc.max_reconnect_backoff_ms", 10_000),
        ("grpc.primary_user_agent", f"deltawire-python/{__version__}"),
    ]
    if is_local(target):
        # gRPC would send even loopback traffic, tokens and all, through the proxy that $http_proxy names.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _host(address: str) -> str:
    """The host of "host:port", "[v6]:port", "host" or a bare IPv6 address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _is_loopback(host: str) -> bool:
    """Whether the host is this machine, by its name or number alone; nothing is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
