"""The client that the options describe, its first connection, and how it makes its calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from deltawire._channel import CallOptions, ConnectOptions, tls_credentials
from deltawire._cli.files import refuse_file
from deltawire._cli.status import FailedError, UsageError
from deltawire._client import Client
from deltawire._failure import REASON_TRAILER, failed_call

if TYPE_CHECKING:
    import argparse

# Seconds to wait for the first connection, and the call over it.
CONNECT_TIMEOUT = 10.0
# Any status proves that a gRPC server answers, also the status UNIMPLEMENTED of a server without health checks.
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_OTHER_SCHEMES = frozenset({"unix", "unix-abstract", "vsock", "ipv4", "ipv6", "xds"})
# What `tls_credentials` and `Client` call their arguments, and their options.
_OPTION_OF = {
    "ca_file": "--ca-file",
    "cert_file": "--cert-file",
    "key_file": "--key-file",
    "insecure=True": "--insecure",
    "the token must": "--token must",
    "token_header:": "--token-header:",
    "the vllm_token must": "--vllm-token must",
    "the request_id must": "--request-id must",
}


def client_of(options: argparse.Namespace) -> Client:
    """The client that the options describe.

    Raises:
        UsageError: A target without a port, a file that cannot be used, or a token or request id that cannot be sent.
    """
    connect: ConnectOptions = {
        "token": options.token or None,
        "token_header": options.token_header,
        "insecure": options.insecure,
        "timeout": options.timeout,
    }
    try:
        if _uses_tls(options):
            connect["credentials"] = tls_credentials(
                ca_file=options.ca_file, cert_file=options.cert_file, key_file=options.key_file
            )
        client = Client(options.target, **connect)
        # Refuses what no call can send.
        client.chat._defaults.outgoing(call_options(options))
    except OSError as error:
        refuse_file(error.filename, error)
    except ValueError as error:
        text = str(error)
        for name, option in _OPTION_OF.items():
            text = text.replace(name, option)
        raise UsageError(text) from error
    if not _has_port(options.target):
        message = f"--target {options.target}: needs a port from 1 to 65535, as in 127.0.0.1:50051"
        raise UsageError(message)
    return client


def call_options(options: argparse.Namespace) -> CallOptions:
    """How calls are made."""
    return {"request_id": options.request_id, "vllm_token": options.vllm_token}


def first_call(client: Client, options: argparse.Namespace) -> CallOptions:
    """Connect, and return how calls are made.

    Raises:
        FailedError: See `connect`.
    """
    connect(client, options)
    return call_options(options)


def connect(client: Client, options: argparse.Namespace) -> None:
    """Connect to the gateway by a call that gRPC does not retry, so that a wrong target fails at once.

    Raises:
        FailedError: There is no connection; the message names the option to change.
    """
    check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = client._connections.main.channel.unary_unary(_HEALTH_CHECK)
    timeout = min(options.timeout or CONNECT_TIMEOUT, CONNECT_TIMEOUT)
    try:
        check(b"", timeout=timeout)
    except grpc.RpcError as error:
        failed = failed_call(error)
        if any(name == REASON_TRAILER for name, _ in failed.trailing_metadata() or ()):
            return
        if failed.code() is grpc.StatusCode.UNAVAILABLE:
            raise FailedError(_unreachable(options, failed.details() or "")) from None
        if failed.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = (
                f"no answer from {options.target} within {timeout:g} s: is the gateway running there? {_ELSEWHERE}"
            )
            raise FailedError(message) from None


_ELSEWHERE = "If it is elsewhere, set --target or $DELTAWIRE_TARGET"


def _unreachable(options: argparse.Namespace, details: str) -> str:
    """Why there is no connection, and which option to change."""
    target = options.target
    if "WRONG_VERSION_NUMBER" in details:
        return f"{target} does not use TLS: leave out {_tls_option(options)}, or set --target to a port that does"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return f"the certificate of {target} is not trusted: set --ca-file to the CA that issued it"
    if "resolving" in details or "DNS resolution" in details:
        return f"the host name in --target {target} cannot be resolved"
    if "Expected SETTINGS frame" in details or "http1" in details.lower():
        return f"{target} does not use gRPC: set --target to the port of the gateway, not to that of vLLM"
    why = details.rpartition(": ")[2].strip() or "no connection"
    why = why[0].lower() + why[1:]
    tls = "" if _uses_tls(options) or why != "socket closed" else ", and does it use TLS (--tls)"
    return f"{why}: is the gateway running at {target}{tls}? {_ELSEWHERE}"


def _uses_tls(options: argparse.Namespace) -> bool:
    """Whether any option asks for TLS."""
    return bool(options.tls or options.ca_file or options.cert_file or options.key_file)


def _tls_option(options: argparse.Namespace) -> str:
    """The option that asks for TLS."""
    return "--tls" if options.tls else "--ca-file" if options.ca_file else "--cert-file"


def _is_port(text: str) -> bool:
    """Whether a text is a port. gRPC would use 65,537 as port 1."""
    return text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65_536


def _has_port(target: str) -> bool:
    """Whether each address has a port. gRPC would use 443 for one without."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in _OTHER_SCHEMES:
        return True
    if colon and scheme == "dns":
        target = rest.rpartition("/")[2]
    for address in target.split(","):
        host, _, port = address.rpartition(":")
        # A bare IPv6 address has no port: "[::1]:50051" has.
        if not host or not _is_port(port) or (":" in host and not host.endswith("]")):
            return False
    return True
