"""The settings themselves: a frozen tree whose field descriptions are also the help and the example file.

`Settings` checks what it is made of, so one that exists can be served with. Where values come from is for `sources`.
Times are seconds, sizes bytes, throughout.
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

from deltawire_server.settings import lines, values

if TYPE_CHECKING:
    from deltawire_server.access import Principal

KIB = 1024
MIB = 1024 * KIB

# A time beyond a week is a number of milliseconds in the wrong place.
_WEEK = 7 * 24 * 3600.0
# gRPC keeps message sizes in 32 bits; the others share the limit so that none can be raised past what can be sent.
_MOST_BYTES = 2**31 - 1

Whole = Annotated[int, BeforeValidator(values.number)]
Bytes = Annotated[int, BeforeValidator(values.number), Field(ge=1 * KIB, le=_MOST_BYTES)]
Seconds = Annotated[float, BeforeValidator(values.number), Field(gt=0, le=_WEEK, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, BeforeValidator(values.number), Field(ge=0, le=_WEEK, allow_inf_nan=False)]
OptionalFile = Annotated[
    Annotated[Path, AfterValidator(values.readable_file)] | None, BeforeValidator(lambda value: value or None)
]
ADDRESSES = "an address or a list of addresses"
"""A field's `title` says what it takes, where its type cannot."""

ProviderId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, and no value in any exception's text."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    def remarks(self) -> tuple[str, ...]:
        """What printed settings say beside the values, a line each; no secrets."""
        return ()


class ServerSettings(Section):
    """The listener, what it admits, and how it ends."""

    listen: Annotated[
        tuple[Annotated[str, AfterValidator(values.address)], ...],
        BeforeValidator(values.listed),
        Field(min_length=1),
    ] = Field(
        default=("127.0.0.1:50051",),
        title=ADDRESSES,
        description=(
            "Addresses to listen on: host:port, [IPv6 address]:port or unix:/path; one, or a list (with commas in "
            "the environment). Port 0 takes any free port. The default is reached from this machine only, so that "
            "nothing is exposed by accident."
        ),
    )
    tls_cert_file: OptionalFile = Field(
        default=None,
        examples=["/etc/deltawire/tls.crt"],
        description=(
            "PEM file with the server's certificate chain, leaf first. Without it TCP listeners speak plaintext. "
            "Needs tls_key_file."
        ),
    )
    tls_key_file: OptionalFile = Field(
        default=None,
        examples=["/etc/deltawire/tls.key"],
        description="PEM file with the private key of tls_cert_file, not encrypted.",
    )
    tls_client_ca_file: OptionalFile = Field(
        default=None,
        examples=["/etc/deltawire/clients-ca.crt"],
        description=(
            "PEM file with the authorities whose client certificates are accepted. When set, every caller must show "
            "one (mutual TLS). Needs tls_cert_file and tls_key_file."
        ),
    )
    # After the fields it depends on: a validator sees only those that come before its own.
    allow_plaintext: bool = Field(
        default=False,
        description=(
            "Serve without TLS on addresses that other machines can reach. Usual behind a sidecar or a load balancer "
            "that does TLS; off by default, since prompts and tokens would cross the network readable."
        ),
    )
    max_streams: Whole = Field(
        default=1000,
        ge=1,
        le=100_000,
        description=(
            "Completions under way at once; more are refused with RESOURCE_EXHAUSTED (TOO_MANY_STREAMS). The default "
            "is about what one process forwards at full speed; each takes one connection to a provider."
        ),
    )
    max_connections: Whole = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description=(
            "Connections of clients at once, on all addresses together; more are closed as soon as they are accepted. Never "
            "more than half of the process's file descriptors, whose limit is raised to the hard one at start-up (see `serving` "
            "in the log). The default is ten times what proxies with a few connections each need; an idle one takes about "
            "30 KiB."
        ),
    )
    max_concurrent_streams: Whole = Field(
        default=2000,
        ge=1,
        le=100_000,
        description=(
            "Calls at once on one connection; a client delays further ones or opens another connection. The default is "
            "twice that of max_streams, since a proxy may send everything over one connection: do not set it lower than "
            "max_streams."
        ),
    )
    handshake_timeout: Seconds = Field(
        default=10.0,
        description=(
            "Seconds that a new connection may take until TLS and HTTP/2 are set up; then it is closed. The default "
            "outlasts a slow mobile network; gRPC's own is 120, in which a silent connection would keep its place."
        ),
    )
    max_receive_bytes: Bytes = Field(
        default=20 * MIB,
        description=(
            "Bytes of the largest request. The default leaves room for a few images; gRPC's own is 4 MiB. To receive a request "
            "takes three times as much memory for a moment."
        ),
    )
    max_receiving: Whole = Field(
        default=64,
        ge=1,
        le=100_000,
        description=(
            "Requests that are received at once, each of at most max_receive_bytes, a quarter of them of one caller; "
            "further calls wait, and nothing of theirs is received beyond 64 KiB. A small request takes its turn for less "
            "than a millisecond; the default is 1.25 GiB of the largest."
        ),
    )
    receive_timeout: Seconds = Field(
        default=60.0,
        description=(
            "Seconds that a request may take to arrive, else its call ends with DEADLINE_EXCEEDED (DURATION_LIMIT_EXCEEDED); "
            "and that it may wait for its turn before, else with RESOURCE_EXHAUSTED (TOO_MANY_STREAMS). The default lets "
            "16 MiB of images come over 3 Mbit/s."
        ),
    )
    max_memory_bytes: Annotated[int | None, BeforeValidator(values.number)] = Field(
        default=None,
        ge=64 * MIB,
        le=2**50,
        examples=[4 * 1024 * MIB],
        description=(
            "Bytes of memory that the requests, answers, queues and retained streams of all calls may take together. At seven "
            "eighths of it new calls are refused with RESOURCE_EXHAUSTED (MEMORY_LIMIT_EXCEEDED), at all of it the largest "
            "ones are ended. Not set, half of what the process may use: its cgroup's limit, else the machine's memory. The "
            "other half is for the process itself and what gRPC and the sockets copy. Set it if several processes share that."
        ),
    )
    max_completed_bytes: Bytes = Field(
        default=1 * MIB,
        description=(
            "Bytes up to which the last event of a stream repeats the whole answer; above, it says messages_omitted. "
            "The default stays well below the 4 MiB that gRPC clients receive by default."
        ),
    )
    max_duration: Seconds = Field(
        default=3600.0,
        description=(
            "Seconds after which a call without an earlier deadline is ended. The default, an hour, outlasts any "
            "answer that somebody waits for."
        ),
    )
    drain_delay: SecondsOrNone = Field(
        default=2.0,
        description=(
            "Seconds between reporting NOT_SERVING and refusing new calls on shutdown. The default lets load "
            "balancers notice first; 0 for none."
        ),
    )
    drain_grace: SecondsOrNone = Field(
        default=30.0,
        description=(
            "Seconds that calls under way get to end on shutdown before they are cancelled. With drain_delay it must "
            "stay below what the supervisor waits: with the defaults set Kubernetes' terminationGracePeriodSeconds "
            "to 35."
        ),
    )
    reflection: bool = Field(
        default=True,
        description=(
            "Serve gRPC reflection, by which tools such as grpcurl learn the API. It tells no more than the "
            "published proto files, hence on."
        ),
    )
    min_ping_interval: Seconds = Field(
        default=5.0,
        description=(
            "Seconds that must lie between two keepalive pings of a client; after 20 that come sooner its connection is "
            "closed with ENHANCE_YOUR_CALM. The default is half of the 10 below which gRPC clients do not ping, since "
            "networks do not deliver them evenly."
        ),
    )
    keepalive_time: Seconds = Field(
        default=30.0,
        description=(
            "Seconds without traffic after which the server pings a client. The default stays below the 60 after "
            "which common load balancers drop a silent connection."
        ),
    )
    ping_timeout: Seconds = Field(
        default=20.0,
        description=(
            "Seconds to wait for the answer to a ping before the connection counts as lost and its generations are "
            "stopped. The default rides out a short network fault; with keepalive_time, a vanished caller costs at "
            "most 50."
        ),
    )

    @property
    def tls(self) -> bool:
        """Whether TCP listeners speak TLS."""
        return self.tls_cert_file is not None

    # In these a key that `info.data` lacks was itself wrong and has its own error.

    @field_validator("tls_key_file")
    @classmethod
    def _key_goes_with_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert_file" in info.data:
            certificate = info.data["tls_cert_file"]
            if certificate is not None and value is None:
                raise values.DependencyError(
                    f"is missing, but the certificate {certificate} needs its key: set it (--tls-key-file)",
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
    def _plaintext_is_chosen(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and "listen" in info.data and info.data.get("tls_cert_file", "wrong") is None:
            exposed = [listen for listen in info.data["listen"] if not values.is_local(listen)]
            if exposed:
                raise values.DependencyError(
                    f"is false, but {', '.join(exposed)} can be reached from other machines and has no TLS: set "
                    "server.tls_cert_file and server.tls_key_file (--tls-cert-file, --tls-key-file), or, where something "
                    "in front does TLS, --allow-plaintext (server.allow_plaintext = true)",
                    because="listen",
                )
        return value


class AccessSettings(Section):
    """Who may call, read and change: a line for each caller, `NAME PERMISSIONS CREDENTIAL`.

    PERMISSIONS are call (completions), read (look at models and providers), change (register models, and change those that the
    caller registered) and operate (with change: also those that others registered), joined by commas, or all.
    CREDENTIAL is sha256: and the SHA-256 of the caller's key, in hexadecimal digits; or the key itself, at least 16
    printable ASCII characters without a colon; or a name in the caller's certificate, by its kind: mtls:uri:, mtls:dns:, or
    mtls:cn: for the common name of a certificate without alternative names. `#` begins a comment. Keys come as
    `authorization: Bearer …`. Without any line everybody may do everything.
    """

    keys_file: Annotated[
        Annotated[Path, AfterValidator(values.lines_file)] | None, BeforeValidator(lambda value: value or None)
    ] = Field(
        default=None,
        examples=["/etc/deltawire/keys"],
        description=(
            "File of lines that say who may call, such as: ci call,read sha256:9f86… Keep others from writing it, and, "
            "with keys themselves in it, from reading it."
        ),
    )
    keys: Annotated[SecretStr | None, AfterValidator(lines.hashed)] = Field(
        default=None,
        examples=["ops all sha256:…; frontend call mtls:dns:frontend.mesh"],
        description=(
            "More such lines, with ; or line ends between them; names and credentials are unique over both. Never "
            "printed, and no flag sets it, since flags show in ps."
        ),
    )
    open: bool = Field(
        default=False,
        description=(
            "Let everybody do everything. Only true opens a gateway that has lines when its settings are read again: lines "
            "that are missing then are taken for a mistake and refused. Contradicts lines, so true with lines is refused."
        ),
    )
    revoke: Annotated[Literal["end", "finish"], BeforeValidator(values.lower)] = Field(
        default="end",
        description=(
            "What becomes of the calls under way when settings are read again and their caller's line was removed, has another "
            "credential or lacks the permission. The default, end, ends them and generation for retained streams, with "
            "ACCESS_CHANGED, since a key is revoked because it leaked. With finish they go on to their end. Watches of "
            "models are ended in either case, by any change of lines."
        ),
    )
    _entries: tuple[lines.Entry, ...] = PrivateAttr(default=())
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def principals(self) -> tuple[Principal, ...]:
        """Who may call; names and credentials are unique. None means that everybody may do everything."""
        return tuple(entry.principal for entry in self._entries)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is unsafe about how the file is kept, for the log; no secrets."""
        return self._warnings

    def remarks(self) -> tuple[str, ...]:
        """Who may call, with masked keys."""
        if not self._entries:
            return ("everybody may do everything",)
        return tuple(f"{entry.principal.masked()}  # {entry.setting} {entry.place}" for entry in self._entries)

    @model_validator(mode="after")
    def _lines_are_read(self) -> Self:
        self._entries, self._warnings = lines.read(self.keys_file, self.keys)
        if self.open and self._entries:
            raise lines.LinesError(
                [("open", "is true, but there are lines that say who may call: remove either this key or all lines")]
            )
        return self


class StreamSettings(Section):
    """What one completion may hold in memory, and how long it waits for its caller."""

    queue_bytes: Bytes = Field(
        default=256 * KIB,
        description=(
            "Bytes of unsent events at which reading from the provider stops until the caller has taken some. The "
            "default is a minute of fast generation, and 256 MiB if a thousand callers stall."
        ),
    )
    slow_caller_timeout: Seconds = Field(
        default=30.0,
        description=(
            "Seconds that one message waits for its caller to take it; then generation is stopped and the "
            "call ends with RESOURCE_EXHAUSTED (SLOW_CALLER). A provider generates on whether read or not, hence a "
            "limit. The same for a message of a watch of models (SLOW_WATCHER)."
        ),
    )
    tail_timeout: Seconds = Field(
        default=2.0,
        description=(
            "Seconds that the usage and the end of an answer may take after the last finish reason. The answer is whole "
            "then: it ends with what is known of its usage. A vLLM sends both within milliseconds."
        ),
    )
    max_tool_calls: Whole = Field(
        default=128,
        ge=1,
        le=65536,
        description=(
            "Tool calls in one answer; more end it with an error. The default is beyond what any model asks for at "
            "once: past it, a model repeats itself."
        ),
    )
    max_tool_call_bytes: Bytes = Field(
        default=4 * MIB - 64 * KIB,
        le=4 * MIB - 64 * KIB,
        description=(
            "Bytes of one tool call's arguments, its name counted twice; more end the answer with an error. The default "
            "holds any file a model writes in one call, and is the most that fits into one message of 4 MiB, which is what "
            "gRPC clients receive by default."
        ),
    )
    max_answer_bytes: Bytes = Field(
        default=16 * MIB,
        description=(
            "Bytes of memory that the gateway holds of one answer, mostly the arguments of tool calls; more end it with "
            "RESOURCE_EXHAUSTED (ANSWER_TOO_LARGE). The text of a stream does not count: what is sent is let go, but for "
            "max_completed_bytes. The default holds 128 calls with 64 KiB each twice over."
        ),
    )
    max_event_bytes: Bytes = Field(
        default=16 * MIB,
        description=(
            "Bytes of one event in a provider's stream; more end the answer with an error. Events are small, except "
            "from parsers that send a whole call at once: the default is four of max_tool_call_bytes."
        ),
    )


class RetentionSettings(Section):
    """Streams that are kept so that a caller who lost its connection can go on: all in memory, and gone with the process."""

    max_retention: SecondsOrNone = Field(
        default=600.0,
        description=(
            "Seconds that a caller may ask for a stream to be kept while nobody reads it, at most; 0 for no retention at "
            "all. The default outlasts a redeployment of the caller; a stream that nobody comes back to is generated for "
            "nothing until then."
        ),
    )
    max_stream_bytes: Bytes = Field(
        default=8 * MIB,
        description=(
            "Bytes that are kept of one stream; its oldest messages go first. The default holds a hundred thousand "
            "tokens, each in a message of its own."
        ),
    )
    max_bytes: Bytes = Field(
        default=256 * MIB,
        description=(
            "Bytes that are kept of all streams together; then streams that have ended go, the one that ended first "
            "before the others, and after them the oldest messages of those under way. Beyond that each stream under way keeps "
            "up to 256 KiB that its readers have not taken yet. The default is what queue_bytes may come to."
        ),
    )


class ImageSettings(Section):
    """Images in requests, and who fetches those that are given by address.

    A gateway that fetches for its callers reaches what they cannot, so by default it fetches nothing, and from inside (private
    addresses, this machine, a cloud's metadata) it never does, whatever is allowed here.
    """

    urls: Annotated[Literal["refuse", "fetch", "pass"], BeforeValidator(values.lower)] = Field(
        default="refuse",
        description=(
            "What becomes of an image's address. The default, refuse, fails the call. With fetch the gateway fetches the "
            "image from allowed_hosts. With pass the engine fetches it from wherever it likes, inside too: only for a vLLM "
            "that is started with --allowed-media-domains."
        ),
    )
    allowed_hosts: Annotated[
        tuple[Annotated[str, AfterValidator(values.image_host)], ...], BeforeValidator(values.listed)
    ] = Field(
        default=(),
        title="a host or a list of hosts",
        examples=["images.example.com"],
        description=(
            "Hosts that images may be fetched from: names, *.example.com for all below one, addresses, or * for any on the "
            "public internet; with :port for another than the scheme's own. One, or a list (with commas in the environment). "
            "Empty allows none, so fetch needs some."
        ),
    )
    schemes: Annotated[
        tuple[Annotated[Literal["https", "http"], BeforeValidator(values.lower)], ...],
        BeforeValidator(values.listed),
        Field(min_length=1),
    ] = Field(
        default=("https",),
        title="https, http or a list of both",
        description=(
            "How images may be fetched. The default is https alone: what comes by http may be from anybody on the way."
        ),
    )
    max_images: Whole = Field(
        default=16,
        ge=1,
        le=1024,
        description=(
            "Images in one request; more are refused. The default is beyond what vision models are shown at once; vLLM's own "
            "limit is --limit-mm-per-prompt."
        ),
    )
    max_image_bytes: Bytes = Field(
        default=16 * MIB,
        description=(
            "Bytes of one image, sent or fetched; a larger one is refused. The default holds any photograph; models shrink "
            "them to far less."
        ),
    )
    max_fetched_bytes: Bytes = Field(
        default=20 * MIB,
        description=(
            "Bytes of all images that are fetched for one request. The default is that of max_receive_bytes: by addresses a "
            "request brings in no more than it could hold itself."
        ),
    )
    timeout: Seconds = Field(
        default=10.0,
        description=(
            "Seconds to fetch one image, from looking up its host to its last byte, redirects included. The default is ample "
            "for a file server, and the caller's prompt waits."
        ),
    )
    max_redirects: Whole = Field(
        default=3,
        ge=0,
        le=10,
        description="Redirects of one image; each is judged as its address was. The default is what image hosts need.",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _fetching_needs_hosts(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("urls") == "fetch" and not value:
            raise values.DependencyError(
                "is empty, so nothing could be fetched: list hosts, or write * for any on the public internet",
                because="urls",
            )
        return value

    @field_validator("allowed_hosts", "schemes")
    @classmethod
    def _passing_has_no_limits(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        # A default may stand in a file, since printed settings have it.
        if info.data.get("urls") == "pass" and info.field_name and value != cls.model_fields[info.field_name].default:
            raise ValueError(
                "has no effect with images.urls = pass, where the engine fetches from wherever its own "
                "--allowed-media-domains allows: remove it, or set images.urls = fetch"
            )
        return value


class ProviderSettings(Section):
    """A vLLM server, or several alike. Its id is the last part of the table's name: a-z, digits, `-`, `_` and `.`."""

    base_url: Annotated[
        tuple[Annotated[str, AfterValidator(values.base_url)], ...],
        BeforeValidator(values.listed),
        AfterValidator(values.replicas),
        Field(min_length=1),
    ] = Field(
        title=ADDRESSES,
        examples=["http://127.0.0.1:8000/v1"],
        description=(
            "The vLLM server's address, http or https, with or without /v1; a prefix before it is kept. A list (with "
            "commas in the environment and the flag) names replicas that serve the same models: each call goes to the "
            "one with the fewest streams, and to the next if that one is away. Credentials do not belong here: see "
            "api_token. Required."
        ),
    )
    api_token: Annotated[SecretStr | None, AfterValidator(values.token)] = Field(
        default=None,
        examples=["the server's --api-key"],
        description=(
            "Bearer token sent as Authorization; a caller's own (metadata x-vllm-api-token), where it is sent, comes before "
            "it: see accept_caller_tokens. Not "
            "set, none is sent. Never printed, and no flag sets it, since flags show in ps."
        ),
    )
    accept_caller_tokens: bool = Field(
        default=False,
        description=(
            "Send callers' own tokens (metadata x-vllm-api-token) to this provider also for calls that do not name it: by a "
            "bare model name or an alias, or when all providers are listed. By default a token goes only to the provider "
            "that the call names, as in provider/model, so that no other server learns it. With a single provider every "
            "call means that one, and this setting changes nothing."
        ),
    )
    headers: Annotated[Mapping[str, SecretStr], AfterValidator(values.headers)] = Field(
        default_factory=dict,
        title="a table of names and values, in quotes",
        examples=[{"x-team": "search"}],
        description=(
            "Further headers sent with every request, for what stands in front of the server: one table here, or "
            "[providers.<id>.headers]. Not those that the gateway sets itself. Values are never printed, and stand in "
            "the file only. None by default."
        ),
    )
    allowed_models: Annotated[
        tuple[Annotated[str, AfterValidator(values.model_pattern)], ...], BeforeValidator(values.listed)
    ] = Field(
        default=(),
        title="a name or a list of names",
        examples=[("smollm2", "team-a/*")],
        description=(
            "Names of the server's models that may be used, or shell patterns of them (*, ?, [ab]; upper and lower "
            "case differ); others are not listed, and asking for one fails. With commas in the environment. Empty, the "
            "default, allows all."
        ),
    )
    allowed_extra_fields: Annotated[
        tuple[Annotated[str, AfterValidator(values.field_pattern)], ...], BeforeValidator(values.listed)
    ] = Field(
        default=(),
        title="a name or a list of names",
        examples=[("repetition_detection", "return_*")],
        description=(
            "Names of the server's own request fields that callers may set by extra_body, or shell patterns of them; "
            "none that the API has a field for. Fields can cost the server dearly or change what its answers mean, so "
            "that, empty, the default allows none. Fields that reach outside of the request or change the engine, such as "
            "chat_template, kv_transfer_params, mm_processor_kwargs, media_io_kwargs and vllm_xargs, are covered by no pattern "
            "and must be named. With commas in the environment."
        ),
    )
    tls_verify: Annotated[bool | Path, PlainValidator(values.tls_verify)] = Field(
        default=True,
        description=(
            "How an https provider's certificate is checked: true, by the system's authorities; a path, by those in "
            "that PEM file (~ is expanded); false, not at all. Strings true, false, 1 and 0 mean the booleans."
        ),
    )
    max_tokens: Annotated[int | None, BeforeValidator(values.number)] = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        examples=[4096],
        description=(
            "Tokens that a request without a limit of its own may generate. Not set, none is sent, and vLLM stops "
            "where the model's context ends."
        ),
    )
    connect_timeout: Seconds = Field(
        default=5.0,
        description="Seconds to connect, TLS included. The default is ample within a data centre.",
    )
    first_event_timeout: Seconds = Field(
        default=600.0,
        description=(
            "Seconds from sending a request to the first event of its answer. The default is long, as a busy server "
            "queues and a long prompt takes minutes."
        ),
    )
    silence_timeout: Seconds = Field(
        default=300.0,
        description=(
            "Seconds between two events of an answer; comments do not count. The default allows for a server that "
            "preempts a request to serve others."
        ),
    )
    engine: Annotated[Literal["auto", "vllm", "proxy"], BeforeValidator(values.lower)] = Field(
        default="auto",
        description=(
            "What answers at base_url. With vllm, the server itself or a proxy that changes nothing, request fields that its "
            "version does not know are refused. With proxy none is refused, and the arguments of strict tools are checked "
            "by the gateway, since proxies drop fields. The default, auto, finds out; deltawire health shows it."
        ),
    )
    refresh_interval: Seconds = Field(
        default=30.0,
        description=(
            "Seconds between two listings of the server's models. The default notices a new adapter soon, and costs a "
            "server next to nothing."
        ),
    )


class RegistrySettings(Section):
    """Where registered models are kept."""

    database_url: Annotated[str, AfterValidator(values.database_url)] = Field(
        default="",
        repr=False,  # it may hold a password
        examples=["sqlite:////var/lib/deltawire/registry.db"],
        description=(
            "The database. SQLite, for gateways on one machine: sqlite:///relative/path or sqlite:////absolute/path. "
            "PostgreSQL, for any number of them: postgresql://user@host/name; a password is best left to $PGPASSWORD or "
            "~/.pgpass, since flags show in ps. Not set or empty, deltawire/registry.db under $XDG_STATE_HOME, else under "
            "~/.local/state."
        ),
    )
    max_models: Whole = Field(
        default=10_000,
        ge=1,
        le=100_000,
        description=(
            "Models that can be registered, over all gateways that share the database; more are refused with "
            "RESOURCE_EXHAUSTED (REGISTRY_FULL). Each gateway keeps all of them in memory. The default is far beyond what "
            "people name, and loads within seconds."
        ),
    )
    max_aliases: Whole = Field(
        default=20_000,
        ge=0,
        le=1_000_000,
        description=(
            "Aliases of all registered models together; more are refused in the same way. A model has at most 32. The "
            "default is two for each of max_models."
        ),
    )
    max_bytes: Bytes = Field(
        default=32 * MIB,
        description=(
            "Bytes of text of all registered models together: names, and annotations as JSON in ASCII, as the database "
            "keeps them; more is refused in the same way. The default is 3 KiB for each of max_models, and half of the "
            "64 MiB by which one caller's requests may let a gateway grow."
        ),
    )


class LogSettings(Section):
    """What is logged, on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(values.lower)] = Field(
        default="info",
        description="The least severe that is logged. The default is one line per call and per change of state.",
    )
    format: Annotated[Literal["auto", "json", "text"], BeforeValidator(values.lower)] = Field(
        default="auto",
        description=(
            "One JSON object or one line of text per entry. The default, auto, is text on a terminal, for people, "
            "else JSON, for collectors."
        ),
    )


class Settings(Section):
    """Everything the gateway is told. Hand it to `app`, whose parts each take their own section."""

    server: ServerSettings = Field(default_factory=ServerSettings, description="The listener.")
    access: AccessSettings = Field(default_factory=AccessSettings, description="Who may call.")
    stream: StreamSettings = Field(default_factory=StreamSettings, description="Each completion.")
    retention: RetentionSettings = Field(default_factory=RetentionSettings, description="Streams that can be resumed.")
    images: ImageSettings = Field(default_factory=ImageSettings, description="Images in requests.")
    providers: Mapping[ProviderId, ProviderSettings] = Field(
        default_factory=dict, description="Who generates, by the operator's name for each; at least one."
    )
    registry: RegistrySettings = Field(default_factory=RegistrySettings, description="Registered models.")
    log: LogSettings = Field(default_factory=LogSettings, description="Logging.")

    @field_validator("access")
    @classmethod
    def _identities_are_asked_for(cls, value: AccessSettings, info: ValidationInfo) -> AccessSettings:
        # A server section that is itself wrong is not there.
        if "server" in info.data and info.data["server"].tls_client_ca_file is None:
            problems = lines.certificates_needed(value._entries)
            if problems:
                raise lines.LinesError(problems)
        return value

    @field_validator("providers")
    @classmethod
    def _there_is_a_provider(cls, value: Mapping[str, ProviderSettings]) -> Mapping[str, ProviderSettings]:
        if not value:
            raise ValueError(
                "nobody to generate: give a vLLM server's address by --vllm-url http://127.0.0.1:8000/v1, by environment "
                'VLLM_URL, or in the settings file as base_url = "http://127.0.0.1:8000/v1" under [providers.vllm]'
            )
        return value


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "server": ServerSettings,
        "access": AccessSettings,
        "stream": StreamSettings,
        "retention": RetentionSettings,
        "images": ImageSettings,
        "providers": ProviderSettings,
        "registry": RegistrySettings,
        "log": LogSettings,
    }
)
"""The model of each section's keys; under `providers`, of each provider's."""
