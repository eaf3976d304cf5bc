"""The settings: a frozen tree of models. The docstrings of the fields are also the text of `--help` and of the example file.

Construction validates all values, so every `Settings` object is usable. `sources` reads the values. All times are in seconds,
all sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 -- pydantic evaluates the annotations.
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deltawire_server.access import CERTIFICATE_HEADER, Trust, parse_proxy
from deltawire_server.limits import MAX_LIMIT
from deltawire_server.settings import lines, values

if TYPE_CHECKING:
    from deltawire_server.access import Principal

KIB = 1024
MIB = 1024 * KIB

# A longer time is most likely given in milliseconds by mistake.
_WEEK = 7 * 24 * 3600.0
# gRPC stores message sizes in 32 bits. The other sizes share the limit, so that none exceeds what can be sent.
_MOST_BYTES = 2**31 - 1

Whole = Annotated[int, BeforeValidator(values.number)]
Bytes = Annotated[int, BeforeValidator(values.number), Field(ge=1 * KIB, le=_MOST_BYTES)]
Limit = Annotated[int, BeforeValidator(values.number), Field(ge=0, le=MAX_LIMIT)]
Seconds = Annotated[float, BeforeValidator(values.number), Field(gt=0, le=_WEEK, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, BeforeValidator(values.number), Field(ge=0, le=_WEEK, allow_inf_nan=False)]
OptionalFile = Annotated[
    Annotated[Path, AfterValidator(lambda value: values.readable_file(value))] | None,
    BeforeValidator(lambda value: value or None),
]
ADDRESSES = "an address or a list of addresses"
"""The `title` of a field describes the values that it accepts, if its type does not."""

MAX_WORKERS = 256
"""As many as the ids of completions can name."""

ProviderId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class Section(BaseModel):
    """Base class of all sections: frozen, without unknown keys, and with no values in the text of exceptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True, use_attribute_docstrings=True
    )

    def remarks(self) -> tuple[str, ...]:
        """Additional lines for the printed settings; they contain no secrets."""
        return ()


class ServerSettings(Section):
    """The listener, its limits, and how it shuts down."""

    listen: Annotated[
        tuple[Annotated[str, AfterValidator(values.address)], ...],
        BeforeValidator(values.listed),
        Field(min_length=1),
    ] = Field(default=("127.0.0.1:50051",), title=ADDRESSES)
    """Addresses to listen on: host:port, [IPv6 address]:port or unix:/path; one address, or a list (separated by commas in
    the environment). Port 0 selects any free port. The default is reachable from this machine only."""
    tls_cert_file: OptionalFile = Field(default=None, examples=["/etc/deltawire/tls.crt"])
    """PEM file with the server's certificate chain, leaf first. Without it, TCP listeners use plaintext. Requires
    tls_key_file."""
    tls_key_file: OptionalFile = Field(default=None, examples=["/etc/deltawire/tls.key"])
    """PEM file with the unencrypted private key of tls_cert_file."""
    tls_client_ca_file: OptionalFile = Field(default=None, examples=["/etc/deltawire/clients-ca.crt"])
    """PEM file with the certificate authorities for client certificates. If set, every client must present a certificate
    (mutual TLS). Requires tls_cert_file and tls_key_file."""
    # Must come after the fields that it depends on: a validator sees only earlier fields.
    allow_plaintext: bool = False
    """Serve without TLS on addresses that other machines can reach. Use this behind a sidecar or a load balancer that
    terminates TLS. By default it is off, because prompts and tokens would cross the network unencrypted."""
    health_listen: Annotated[str, BeforeValidator(values.lower), AfterValidator(values.port_or_off)] = values.OFF
    """One more address that serves only grpc.health.v1.Health, always without TLS and keys, such as 0.0.0.0:50052; or off.
    Kubernetes' gRPC probes need it if the other addresses use TLS, which they do not support. It reveals nothing but whether
    the gateway accepts calls."""
    workers: Annotated[int, BeforeValidator(values.workers), Field(ge=1, le=MAX_WORKERS)] = Field(
        default=1, title=f"a whole number from 1 to {MAX_WORKERS}, or auto"
    )
    """Processes that serve together as one gateway, on the same port; auto for one for each core. Limits on numbers
    (max_streams, max_connections, max_receiving) apply to each of them; max_memory_bytes and retention.max_bytes are divided
    among them. More than one cannot use a unix socket or a database in memory. The default, 1, suits gateways that a load
    balancer or Kubernetes replicates."""
    max_streams: Whole = Field(default=1000, ge=1, le=100_000)
    """Completions that run at once in each worker; further ones wait, see limits.queue_size. Each uses one connection to a
    provider. The default is about what one process forwards at full speed."""
    load_reports: bool = True
    """Report the utilization of this process with each call, in the metadata endpoint-load-metrics, for load balancers such as
    Envoy's client_side_weighted_round_robin. Clients can read it too. The default is on, because it costs a short call less than
    a thousandth of its time."""
    max_adaptive_delay: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.1
    """Seconds for which deltas may be delayed while the gateway is busy, so that several share a message; 0 never delays them.
    While there is time to spare, every token is sent at once. Under load the delay grows only as far as the load needs. A
    caller's max_coalesce_delay is used instead. The first delta of an answer and all other events are never delayed."""
    max_connections: Whole = Field(default=10_000, ge=1, le=1_000_000)
    """Client connections of each worker at once, over all addresses; further ones are closed as soon as they are accepted.
    The gateway never uses more than half of the process's file descriptors for clients; at startup it raises the soft limit
    to the hard limit (see `serving` in the log). An idle connection takes about 30 KiB. The default is ten times what
    proxies with a few connections each need."""
    max_concurrent_streams: Whole = Field(default=2000, ge=1, le=100_000)
    """Concurrent calls on one connection; the client delays further calls or opens another connection. Do not set it lower
    than max_streams: a proxy may send all calls over one connection. The default is twice the default of max_streams."""
    handshake_timeout: Seconds = 10.0
    """Seconds for the TLS and HTTP/2 handshakes of a new connection; then the connection is closed. The default is enough
    for a slow mobile network; gRPC's own default is 120, during which a silent connection would occupy a slot."""
    max_receive_bytes: Bytes = 20 * MIB
    """Bytes of the largest request. Receiving a request briefly takes three times its size in memory. The default leaves
    room for a few images; gRPC's own default is 4 MiB."""
    max_receiving: Whole = Field(default=64, ge=1, le=100_000)
    """Requests received at once by each worker, each of at most max_receive_bytes; one caller may use a quarter of them.
    Further calls wait, and the gateway receives at most 64 KiB of each. A small request takes less than a millisecond. The
    default amounts to 1.25 GiB of the largest requests."""
    receive_timeout: Seconds = 60.0
    """Seconds for a request to arrive; then the call ends with DEADLINE_EXCEEDED (DURATION_LIMIT_EXCEEDED). A call may wait
    as long for its turn to be received; then it ends with RESOURCE_EXHAUSTED (TOO_MANY_STREAMS). The default is enough for
    16 MiB of images over 3 Mbit/s."""
    max_memory_bytes: Annotated[int | None, BeforeValidator(values.number)] = Field(
        default=None, ge=64 * MIB, le=2**50, examples=[4 * 1024 * MIB]
    )
    """Bytes of memory for the requests, answers, queues and retained streams of all calls together. At seven eighths of the
    limit, new calls are refused with RESOURCE_EXHAUSTED (MEMORY_LIMIT_EXCEEDED), except those of callers that use less than
    their part of it; at the limit, the largest calls of the caller that uses most are ended.
    If not set, the limit is half of the memory that the process may use: its cgroup's limit, or else the machine's memory.
    The other half is for the process itself and for the copies that gRPC and the sockets make. Set it if other processes
    share that memory. With several workers, each gets an equal part of the limit."""
    max_completed_bytes: Bytes = 1 * MIB
    """Bytes up to which the last event of a stream repeats the whole answer; for a larger answer it sets messages_omitted.
    The default stays well below the 4 MiB that gRPC clients receive by default."""
    max_duration: Seconds = 3600.0
    """Seconds after which a call without an earlier deadline is ended. The default, an hour, is longer than any interactive
    answer takes."""
    drain_delay: SecondsOrNone = 2.0
    """Seconds between reporting NOT_SERVING and refusing new calls on shutdown; 0 for no delay. The default gives load
    balancers time to stop sending calls."""
    drain_grace: SecondsOrNone = 30.0
    """Seconds that active calls may continue on shutdown before they are cancelled. drain_delay plus drain_grace must be
    less than the supervisor's stop timeout: with the defaults, set Kubernetes' terminationGracePeriodSeconds to 35."""
    reflection: bool = True
    """Serve gRPC reflection, which tools such as grpcurl use to read the API. By default it is on, because it reveals only
    the published proto files."""
    min_ping_interval: Seconds = 5.0
    """Seconds that must pass between two keepalive pings of a client; after 20 pings that come sooner, the connection is
    closed with ENHANCE_YOUR_CALM. The default is half of 10, the shortest interval of gRPC clients, because networks do not
    deliver pings evenly."""
    keepalive_time: Seconds = 30.0
    """Seconds without traffic after which the server pings a client. The default is below the 60 after which common load
    balancers drop an idle connection."""
    max_connection_age: SecondsOrNone = 1800.0
    """Seconds after which a client is asked to open a new connection, up to a tenth more or less, at random; 0 for never. Calls
    on the old connection run to their end, however long. So the connections of long-lived clients are distributed again after
    a gateway was added, and certificates that were renewed reach them."""
    ping_timeout: Seconds = 20.0
    """Seconds to wait for a ping response before the connection is closed and generation for its calls stops. The default
    tolerates a short network failure; with keepalive_time, a client that vanished is detected after at most 50."""

    @property
    def tls(self) -> bool:
        """Whether TCP listeners use TLS."""
        return self.tls_cert_file is not None

    @property
    def health_address(self) -> str:
        """The address of the additional health service; empty for none."""
        return "" if self.health_listen == values.OFF else self.health_listen

    # In the validators below, a key that is missing from `info.data` was itself invalid and has its own error.

    @field_validator("workers")
    @classmethod
    def _workers_share_ports(cls, value: int, info: ValidationInfo) -> int:
        sockets = [listen for listen in info.data.get("listen", ()) if listen.startswith("unix:")]
        if value > 1 and sockets:
            raise ValueError(
                f"cannot be more than 1 with {', '.join(sockets)}, because only ports can be shared: listen on a port"
            )
        return value

    @field_validator("tls_key_file")
    @classmethod
    def _key_goes_with_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert_file" in info.data:
            certificate = info.data["tls_cert_file"]
            if certificate is not None and value is None:
                raise values.DependencyError(
                    f"is missing, but the certificate {certificate} needs its private key: set it (--tls-key-file)",
                    because="tls_cert_file",
                )
            if certificate is None and value is not None:
                raise ValueError("needs a certificate: set server.tls_cert_file (--tls-cert-file) too")
        return value

    @field_validator("tls_client_ca_file")
    @classmethod
    def _client_ca_needs_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and "tls_cert_file" in info.data and info.data["tls_cert_file"] is None:
            raise ValueError(
                "needs TLS: set server.tls_cert_file and server.tls_key_file (--tls-cert-file, --tls-key-file) too"
            )
        return value

    @field_validator("allow_plaintext")
    @classmethod
    def _plaintext_is_explicit(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and "listen" in info.data and info.data.get("tls_cert_file", "wrong") is None:
            exposed = [listen for listen in info.data["listen"] if not values.is_local(listen)]
            if exposed:
                raise values.DependencyError(
                    f"is false, but {', '.join(exposed)} can be reached from other machines and has no TLS: set "
                    "server.tls_cert_file and server.tls_key_file (--tls-cert-file, --tls-key-file) or, if a proxy in front "
                    "terminates TLS, --allow-plaintext (server.allow_plaintext = true)",
                    because="listen",
                )
        return value


class AccessSettings(Section):
    """Access lines: who may call, read and change. One line per caller: `NAME PERMISSIONS CREDENTIAL`, and its limits.

    PERMISSIONS is `all`, or a comma-separated list of: call (run completions), read (list models and providers), change
    (register models, and change models that the caller registered), operate (with change: also change models that others
    registered; with call: also list, look up and cancel the completions of others, without their content). CREDENTIAL is
    `sha256:` and the SHA-256 digest of the caller's key in hexadecimal; or the key itself, at least 16 printable ASCII
    characters without a colon; or a name in the caller's certificate: `mtls:uri:NAME`, `mtls:dns:NAME`, or `mtls:cn:NAME` for
    the common name of a certificate without alternative names; or `proxy:NAME`, a name that a trusted proxy sends in
    caller_header. Further words are optional: each limit of the section limits, as in streams=20; models=PATTERN,… for the ids
    of the only models that exist for the caller; priority=NUMBER and cache_salt=TEXT to send to the engine. `#` begins a
    comment. Callers send their key as `authorization: Bearer …` or `x-deltawire-key: …`. Without
    any line, every caller may do everything.
    """

    keys_file: Annotated[
        Annotated[Path, AfterValidator(lambda value: values.readable_file(value, "a text file with access lines"))]
        | None,
        BeforeValidator(lambda value: value or None),
    ] = Field(default=None, examples=["/etc/deltawire/keys"])
    """File of access lines, one per caller, such as: ci call,read sha256:9f86… Other users must not be able to write the
    file or, if it contains keys, to read it."""
    keys: Annotated[SecretStr | None, AfterValidator(lines.hashed)] = Field(
        default=None, examples=["ops all sha256:…; frontend call mtls:dns:frontend.mesh"]
    )
    """More access lines, separated by ; or newlines; names and credentials must be unique across the file and this setting.
    The value is never printed. No flag sets it, because command lines are visible in ps."""
    open: bool = False
    """Allow every caller to do everything. If a gateway has access lines, a reload can remove them all only if this is
    true; otherwise the gateway takes their absence for a mistake and refuses the reload. Setting this to true together with
    access lines is an error."""
    revoke: Annotated[Literal["end", "finish"], BeforeValidator(values.lower)] = "end"
    """What happens to active calls if a reload removes the caller's line, changes its credential, takes away the permission,
    or ends the trust in the proxy that asserted the caller. The default, end, ends the calls and generation for retained
    streams with ACCESS_CHANGED, because keys are revoked when they leak. With finish, the calls run to their end. In either
    case, any change of access lines or trusted proxies ends all watches of models."""
    trusted_proxies: Annotated[
        tuple[Annotated[str, AfterValidator(parse_proxy)], ...], BeforeValidator(values.listed)
    ] = Field(default=(), title="a list of proxies", examples=[["mtls:uri:spiffe://mesh/ns/envoy"]])
    """Proxies that may assert who their callers are and from which address they call: `mtls:uri:NAME`, `mtls:dns:NAME` or
    `mtls:cn:NAME`, a name in the proxy's certificate; or `unix`, every caller of a unix socket. The headers of all other
    callers are ignored. Trust only proxies that remove or append to what their own callers send in these headers."""
    caller_header: Annotated[str, AfterValidator(values.caller_header)] = CERTIFICATE_HEADER
    """Header in which a trusted proxy names its caller. The default is Envoy's; the names of the certificate in its last
    element match lines with mtls:, as if the caller had connected itself. The whole value of any other header is a name, at
    most 256 printable ASCII characters without spaces and commas, and matches lines with proxy:."""
    _entries: tuple[lines.Entry, ...] = PrivateAttr(default=())
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def principals(self) -> tuple[Principal, ...]:
        """The callers, with unique names and credentials. If empty, every caller may do everything."""
        return tuple(entry.principal for entry in self._entries)

    @property
    def trust(self) -> Trust:
        """The trusted proxies."""
        return Trust(frozenset(self.trusted_proxies), self.caller_header)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the permissions of the keys file, for the log; they contain no secrets."""
        return self._warnings

    def remarks(self) -> tuple[str, ...]:
        """The access lines, with masked keys."""
        if not self._entries:
            return ("every caller may do everything",)
        return tuple(f"{entry.principal.line(masked=True)}  # {entry.setting} {entry.place}" for entry in self._entries)

    @model_validator(mode="after")
    def _read_lines(self) -> Self:
        self._entries, self._warnings = lines.read(self.keys_file, self.keys)
        if self.open and self._entries:
            raise lines.LinesError(
                [("open", "is true, but there are access lines: remove either this key or all lines")]
            )
        return self


class StreamSettings(Section):
    """Limits of one completion: its memory, and how long it waits for its caller."""

    queue_bytes: Bytes = 256 * KIB
    """Bytes of unsent events at which the gateway stops reading from the provider until the caller has received some. The
    default holds a minute of fast generation, and takes 256 MiB if a thousand callers stall."""
    slow_caller_timeout: Seconds = 30.0
    """Seconds that a caller may take to receive one message; then generation stops and the call ends with
    RESOURCE_EXHAUSTED (SLOW_CALLER). The limit exists because a provider generates whether the answer is read or not. It
    also applies to each message of a watch of models (SLOW_WATCHER)."""
    tail_timeout: Seconds = 2.0
    """Seconds to wait for the usage and the end of an answer after the last finish reason. The answer is complete at that
    point; after the timeout it ends with the usage received so far. vLLM sends both within milliseconds."""
    max_tool_calls: Whole = Field(default=128, ge=1, le=65536)
    """Tool calls in one answer; more end the answer with an error. The default is more than a model requests at once; a
    model that exceeds it repeats itself."""
    max_tool_call_bytes: Bytes = Field(default=4 * MIB - 64 * KIB, le=4 * MIB - 64 * KIB)
    """Bytes of one tool call's arguments plus twice its name; more end the answer with an error. The default holds any file
    that a model writes in one call. It is the most that fits into one message of 4 MiB, which gRPC clients receive by
    default."""
    max_answer_bytes: Bytes = 16 * MIB
    """Bytes of memory for one answer, mostly the arguments of tool calls; more end it with RESOURCE_EXHAUSTED
    (ANSWER_TOO_LARGE). The text of a stream does not count, because the gateway keeps at most max_completed_bytes of sent
    text. The default holds 128 calls with 64 KiB each twice."""
    max_event_bytes: Bytes = 16 * MIB
    """Bytes of one event in a provider's stream; more end the answer with an error. Events are small, except from parsers
    that send a whole tool call at once: the default is four times that of max_tool_call_bytes."""


class RetentionSettings(Section):
    """Streams that are kept in memory so that a caller who lost its connection can resume. They do not survive a restart."""

    max_retention: SecondsOrNone = 600.0
    """Seconds that a caller may ask the gateway to keep a stream that no client reads, at most; 0 disables retention. The
    default is longer than a redeployment of the caller takes. Until this time has passed, generation continues for streams
    that no caller resumes."""
    max_stream_bytes: Bytes = 8 * MIB
    """Bytes kept of one stream; the oldest messages are dropped first. The default holds a hundred thousand tokens, each in
    a message of its own."""
    max_bytes: Bytes = 256 * MIB
    """Bytes kept of all streams together, in equal parts for the workers. Above the limit, the gateway first drops ended
    streams, in the order in which they ended, then the oldest messages of active streams. In addition, each active stream
    keeps up to 256 KiB that its readers have not received yet. The default is as much as queue_bytes can add up to."""


class LimitsSettings(Section):
    """What one caller may use, so that no caller takes everything, and the queue of a full gateway.

    A caller is an access line, a name in a client certificate or that a trusted proxy asserts, or else a host. An access line can
    replace each of its limits, as in `ci call sha256:… streams=20`. Limits count over all workers of a gateway, unless noted. A
    call above a limit is refused with RESOURCE_EXHAUSTED (CALLER_LIMIT_EXCEEDED), unless noted. 0 means no limit.
    """

    streams: Limit = 0
    """Completions of one caller at once, queued ones included. By default there is no limit, because the queue shares the
    places of a full gateway among its callers."""
    retained_streams: Annotated[int | None, BeforeValidator(values.number)] = Field(
        default=None, ge=0, le=MAX_LIMIT, examples=[100]
    )
    """Completions with retention that one caller may run at once, read or not: each keeps its place if its client disconnects.
    If not set, half of server.max_streams of all workers, so that clients that do not return leave room for others."""
    retained_bytes: Limit = 0
    """Bytes kept of all retained streams of one caller. Above the limit, the gateway first drops the caller's ended streams, then
    the oldest messages of active ones. By default there is no limit: at retention.max_bytes, the caller with the most bytes
    loses its oldest ended stream first."""
    requests_per_minute: Limit = 0
    """CreateChatCompletion, StreamChatCompletion and CountTokens of one caller. The budget of a minute may be used at once, and
    refills evenly. By default there is no limit."""
    tokens_per_minute: Limit = 0
    """Tokens of one caller, prompts and answers. Prompts are counted when an answer begins, if the provider reports them then;
    the rest at its end. No answer is cut: a caller that has exceeded the limit is refused until its budget has refilled. By
    default there is no limit."""
    image_fetches: Limit = 8
    """Images that are fetched at once for one caller by each worker; further ones wait. The default is a quarter of all fetches,
    so that a slow host does not delay the images of other callers."""
    watches: Limit = 100
    """Watches of models of one caller at once. The default allows one for each replica of a large application."""
    queued: Limit = 0
    """Calls of one caller in the queue of each worker. By default there is no limit: if the queue is full, the caller with the
    most calls in it loses the last one of them."""
    queue_size: Whole = Field(default=256, ge=0, le=100_000)
    """Calls of each worker that wait while server.max_streams completions run; further ones are refused with RESOURCE_EXHAUSTED
    (TOO_MANY_STREAMS). The caller with the fewest completions gets the next place. The request of a queued call is not
    received. 0 refuses calls at once. The default is a quarter of the default of max_streams."""
    queue_timeout: Seconds = 10.0
    """Seconds that a call may wait in the queue; then it is refused in the same way. The default is about what a person
    waits."""


class ImageSettings(Section):
    """Images in requests, and who fetches images that are given by URL.

    The gateway may reach hosts that its callers cannot. So by default it fetches nothing, and it never fetches from internal
    hosts (private addresses, this machine, cloud metadata services), whatever these settings allow.
    """

    urls: Annotated[Literal["refuse", "fetch", "pass"], BeforeValidator(values.lower)] = "refuse"
    """How an image URL is handled. The default, refuse, fails the call. With fetch, the gateway fetches the image from
    allowed_hosts. With pass, the engine fetches it from any host, including internal ones: use it only with a vLLM server
    that is started with --allowed-media-domains."""
    allowed_hosts: Annotated[
        tuple[Annotated[str, AfterValidator(values.image_host)], ...], BeforeValidator(values.listed)
    ] = Field(default=(), title="a host or a list of hosts", examples=["images.example.com"])
    """Hosts that images may be fetched from: a name, *.example.com for all its subdomains, an IP address, or * for any host
    on the public internet; with :port for a port other than the scheme's default. One, or a list (separated by commas in
    the environment). Required if urls is fetch; the default is empty and allows no host."""
    schemes: Annotated[
        tuple[Annotated[Literal["https", "http"], BeforeValidator(values.lower)], ...],
        BeforeValidator(values.listed),
        Field(min_length=1),
    ] = Field(default=("https",), title="https, http or a list of both")
    """URL schemes that images may be fetched by. The default is https only, because anyone on the network path can change a
    response over http."""
    max_images: Whole = Field(default=16, ge=1, le=1024)
    """Images in one request; more are refused. The default is more than vision models take at once; vLLM's own limit is
    --limit-mm-per-prompt."""
    max_image_bytes: Bytes = 16 * MIB
    """Bytes of one image, sent or fetched; a larger image is refused. The default holds any photograph; models scale images
    down to far less."""
    max_fetched_bytes: Bytes = 20 * MIB
    """Bytes of all images that are fetched for one request. The default is that of max_receive_bytes, so that a request
    cannot bring in more by URL than it could contain."""
    timeout: Seconds = 10.0
    """Seconds to fetch one image, from the DNS lookup to the last byte, including redirects. The default is ample for a
    file server; the caller's request waits meanwhile."""
    max_redirects: Whole = Field(default=3, ge=0, le=10)
    """Redirects of one image; each target is validated like the original URL. The default is enough for common image
    hosts."""

    @field_validator("allowed_hosts")
    @classmethod
    def _fetching_needs_hosts(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("urls") == "fetch" and not value:
            raise values.DependencyError(
                "is empty, so nothing could be fetched: list hosts, or write * for any host on the public internet",
                because="urls",
            )
        return value

    @field_validator("allowed_hosts", "schemes")
    @classmethod
    def _passing_has_no_limits(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        # Printed settings contain the defaults, so a file may set them.
        if info.data.get("urls") == "pass" and info.field_name and value != cls.model_fields[info.field_name].default:
            raise ValueError(
                "has no effect with images.urls = pass, because the engine's own --allowed-media-domains decides: "
                "remove it, or set images.urls = fetch"
            )
        return value


class ProviderSettings(Section):
    """A vLLM server, or several replicas. The last part of the table's name is the id: a-z, digits, `-`, `_` and `.`."""

    base_url: Annotated[
        tuple[Annotated[str, AfterValidator(values.base_url)], ...],
        BeforeValidator(values.listed),
        AfterValidator(values.replicas),
        Field(min_length=1),
    ] = Field(title=ADDRESSES, examples=["http://127.0.0.1:8000/v1"])
    """URL of the vLLM server, http or https, with or without /v1; a path prefix before it is kept. A list (separated by
    commas in the environment and the flag) names replicas that serve the same models: each call goes to the replica with
    the fewest streams, or to the next one if that is unreachable. Must not contain credentials: see api_token. Required."""
    api_token: Annotated[SecretStr | None, AfterValidator(values.token)] = Field(
        default=None, examples=["the server's --api-key"]
    )
    """Bearer token to send in the Authorization header. A caller's own token (metadata x-vllm-api-token), if it is sent,
    takes precedence: see accept_caller_tokens. If not set, no token is sent. The value is never printed. No flag sets it,
    because command lines are visible in ps."""
    accept_caller_tokens: bool = False
    """Send callers' own tokens (metadata x-vllm-api-token) to this provider also for calls that do not name it: calls by a
    bare model name or an alias, and calls that list all providers. By default, a token goes only to the provider that the
    call names, as in provider/model, so that no other server receives it. With a single provider, this setting has no
    effect, because every call is for that provider."""
    headers: Annotated[Mapping[str, SecretStr], AfterValidator(values.headers)] = Field(
        default_factory=dict, title="a table of names and values, in quotes", examples=[{"x-team": "search"}]
    )
    """More headers to send with every request, for a proxy in front of the server: an inline table here, or
    [providers.<id>.headers]. Headers that the gateway sets itself are not allowed. Values are never printed, and only the
    settings file can set them. None by default."""
    allowed_models: Annotated[
        tuple[Annotated[str, AfterValidator(values.pattern)], ...], BeforeValidator(values.listed)
    ] = Field(default=(), title="a name or a list of names", examples=[("smollm2", "team-a/*")])
    """Names of the server's models that may be used, or shell patterns (*, ?, [ab]; case-sensitive); other models are not
    listed, and a request for one fails. Separated by commas in the environment. The default, an empty list, allows all
    models."""
    allowed_extra_fields: Annotated[
        tuple[Annotated[str, AfterValidator(values.pattern)], ...], BeforeValidator(values.listed)
    ] = Field(default=(), title="a name or a list of names", examples=[("repetition_detection", "return_*")])
    """Names of the server's own request fields that callers may set in extra_body, or shell patterns; fields that the API
    itself has are not allowed. The default, an empty list, allows none, because such fields can be expensive or change what
    answers mean. Fields that reach outside of the request or change the engine, such as chat_template, kv_transfer_params,
    mm_processor_kwargs, media_io_kwargs and vllm_xargs, match no pattern and must be named. Separated by commas in the
    environment."""
    tls_verify: Annotated[bool | Path, PlainValidator(values.tls_verify)] = True
    """How to verify the certificate of an https provider: true by the system's certificate authorities, a path by those in
    that PEM file (~ is expanded), false not at all. The strings true, false, 1 and 0 mean the booleans."""
    max_tokens: Annotated[int | None, BeforeValidator(values.number)] = Field(
        default=None, ge=1, le=2**31 - 1, examples=[4096]
    )
    """Tokens to generate at most for a request that sets no limit itself. If not set, the gateway sends no limit, and vLLM
    stops at the end of the model's context."""
    connect_timeout: Seconds = 5.0
    """Seconds to connect, including TLS. The default is ample within a data center."""
    first_event_timeout: Seconds = 600.0
    """Seconds from sending a request to the first event of the answer. The default is long, because a busy server queues
    requests and a long prompt takes minutes."""
    silence_timeout: Seconds = 300.0
    """Seconds between two events of an answer; comments do not count. The default allows for a server that preempts a
    request."""
    engine: Annotated[Literal["auto", "vllm", "proxy"], BeforeValidator(values.lower)] = "auto"
    """What base_url leads to. With vllm (the server itself, or a proxy that changes nothing), the gateway refuses request
    fields that the server's version does not support. With proxy, it refuses no fields, and it validates the arguments of
    strict tools itself, because proxies drop fields. The default, auto, detects which one it is; deltawire health shows the
    result."""
    refresh_interval: Seconds = 30.0
    """Seconds between two requests for the server's list of models. The default detects a new adapter soon and costs the
    server almost nothing."""


class RegistrySettings(Section):
    """Storage of registered models."""

    database_url: Annotated[str, AfterValidator(values.database_url)] = Field(
        default="", repr=False, examples=["sqlite:////var/lib/deltawire/registry.db"]
    )
    """URL of the database. SQLite, for gateways on one machine: sqlite:///relative/path or sqlite:////absolute/path.
    PostgreSQL, for gateways on any number of machines: postgresql://user@host/name; put a password into $PGPASSWORD or
    ~/.pgpass, because command lines are visible in ps. If not set or empty: deltawire/registry.db under $XDG_STATE_HOME, or
    else under ~/.local/state."""
    max_models: Whole = Field(default=10_000, ge=1, le=100_000)
    """Models that can be registered, over all gateways that share the database; more are refused with RESOURCE_EXHAUSTED
    (REGISTRY_FULL). Each gateway keeps all of them in memory. The default is far more than is registered by hand, and loads
    within seconds."""
    max_aliases: Whole = Field(default=20_000, ge=0, le=1_000_000)
    """Aliases of all registered models together; more are refused in the same way. A model has at most 32. The default is
    two for each of max_models."""
    max_bytes: Bytes = 32 * MIB
    """Bytes of text of all registered models together: names, and annotations as ASCII JSON, as stored in the database;
    more is refused in the same way. The default is 3 KiB for each of max_models, and half of the 64 MiB by which one
    caller's requests may grow a gateway's memory."""


class UsageSettings(Section):
    """Usage records: which caller used which model, and how many tokens, as JSON lines in files.

    `python -m deltawire_server.usage FOLDER` sums them up.
    """

    folder: Annotated[
        Annotated[Path, AfterValidator(lambda value: values.writable_folder(value))] | None,
        BeforeValidator(lambda value: value or None),
    ] = Field(default=None, title="the path of a folder, in quotes", examples=["/var/lib/deltawire/usage"])
    """Folder of the files, which must exist, on a local disk: calls wait for a line to be written. Gateways may share it, because
    each process writes files of its own, with a new one for each day. By default no records are written."""
    required: bool = False
    """Refuse completions with UNAVAILABLE (STORE_UNAVAILABLE) while records cannot be written, for example because the disk is
    full. By default they run without a record, and deltawire_usage_records_total counts the lost ones. Needs a folder."""
    retention_days: Whole = Field(default=90, ge=0, le=36_500)
    """Days after which a file is removed; 0 keeps all files. The default leaves time to bill a quarter."""
    max_file_bytes: Bytes = 64 * MIB
    """Bytes of a file after which the next one begins. The default holds about 100,000 completions."""

    @field_validator("required")
    @classmethod
    def _records_need_a_folder(cls, value: bool, info: ValidationInfo) -> bool:
        if value and "folder" in info.data and info.data["folder"] is None:
            raise ValueError("is true, but no records are written: set usage.folder too")
        return value


class MetricsSettings(Section):
    """Metrics for Prometheus."""

    listen: Annotated[str, BeforeValidator(values.lower), AfterValidator(values.port_or_off)] = "127.0.0.1:9464"
    """Address at which GET /metrics returns the metrics, over HTTP: host:port, or off. It needs no key, so let only scrapers reach
    it. If the address is in use, the gateway does not start; with the default it serves without metrics and logs a warning,
    because several gateways may run on one machine. With several workers, the page has the metrics of all of them."""

    @property
    def address(self) -> str:
        """The address; empty for none."""
        return "" if self.listen == values.OFF else self.listen

    @property
    def is_default(self) -> bool:
        """Whether the operator did not choose the address."""
        return "listen" not in self.model_fields_set


class LogSettings(Section):
    """Logging, to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(values.lower)] = "info"
    """Lowest severity that is logged. The default logs one line per call and per change of state."""
    format: Annotated[Literal["auto", "json", "text"], BeforeValidator(values.lower)] = "auto"
    """Log one JSON object or one line of text per entry. The default, auto, logs text to a terminal and JSON to anything
    else."""


class Settings(Section):
    """All settings of the gateway, validated. Pass them to `app.Gateway`."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    """The listener and its limits."""
    access: AccessSettings = Field(default_factory=AccessSettings)
    """Who may call."""
    stream: StreamSettings = Field(default_factory=StreamSettings)
    """Limits of each completion."""
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    """Streams that can be resumed."""
    limits: LimitsSettings = Field(default_factory=LimitsSettings)
    """What one caller may use."""
    images: ImageSettings = Field(default_factory=ImageSettings)
    """Images in requests."""
    providers: Mapping[ProviderId, ProviderSettings] = Field(default_factory=dict)
    """The vLLM servers, by the operator's name for each; at least one."""
    registry: RegistrySettings = Field(default_factory=RegistrySettings)
    """Registered models."""
    usage: UsageSettings = Field(default_factory=UsageSettings)
    """Usage records."""
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    """Metrics."""
    log: LogSettings = Field(default_factory=LogSettings)
    """Logging."""

    @field_validator("access")
    @classmethod
    def _names_need_listeners(cls, value: AccessSettings, info: ValidationInfo) -> AccessSettings:
        # An invalid server section is missing from `info.data`.
        if "server" in info.data:
            server: ServerSettings = info.data["server"]
            unix = any(listen.startswith("unix:") for listen in server.listen)
            certificates = server.tls_client_ca_file is not None
            problems = [*lines.unusable(value._entries, value.trust, certificates=certificates, unix=unix)]
            if problems:
                raise lines.LinesError(problems)
        return value

    @field_validator("registry")
    @classmethod
    def _workers_share_the_database(cls, value: RegistrySettings, info: ValidationInfo) -> RegistrySettings:
        if "server" in info.data and info.data["server"].workers > 1 and values.is_in_memory(value.database_url):
            raise ValueError(
                "a database in memory cannot be shared by several workers: set database_url to a file or to PostgreSQL, or "
                "server.workers to 1"
            )
        return value

    @field_validator("providers")
    @classmethod
    def _needs_a_provider(cls, value: Mapping[str, ProviderSettings]) -> Mapping[str, ProviderSettings]:
        if not value:
            raise ValueError(
                "no provider is configured: give a vLLM server's URL by --vllm-url http://127.0.0.1:8000/v1, by environment "
                'VLLM_URL, or in the settings file as base_url = "http://127.0.0.1:8000/v1" under [providers.vllm]'
            )
        return value


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "server": ServerSettings,
        "access": AccessSettings,
        "stream": StreamSettings,
        "retention": RetentionSettings,
        "limits": LimitsSettings,
        "images": ImageSettings,
        "providers": ProviderSettings,
        "registry": RegistrySettings,
        "usage": UsageSettings,
        "metrics": MetricsSettings,
        "log": LogSettings,
    }
)
"""The model of each section; for `providers`, the model of each provider."""
