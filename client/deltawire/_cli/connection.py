"""The client that the options describe, and how it makes its calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire._channel import VLLM_TOKEN, CallOptions, ConnectOptions, tls_credentials
from deltawire._cli.files import refuse_file
from deltawire._cli.status import UsageError
from deltawire._client import Client

if TYPE_CHECKING:
    import argparse


def client_of(options: argparse.Namespace) -> Client:
    """The client that the options describe."""
    connect: ConnectOptions = {
        "token": options.token or None,
        "insecure": options.insecure,
        "timeout": options.timeout,
        "metadata": [(VLLM_TOKEN, options.vllm_token)] if options.vllm_token else [],
    }
    try:
        if options.tls or options.ca_file or options.cert_file or options.key_file:
            connect["credentials"] = tls_credentials(
                ca_file=options.ca_file, cert_file=options.cert_file, key_file=options.key_file
            )
        return Client(options.target, **connect)
    except OSError as error:
        refuse_file(error.filename, error)
    except ValueError as error:
        raise UsageError(str(error).replace("insecure=True", "--insecure")) from error


def call_options(options: argparse.Namespace) -> CallOptions:
    """How calls are made."""
    return {"request_id": options.request_id}
