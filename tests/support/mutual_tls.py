"""A listener that requests client certificates, and its clients."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from tests.support.gateway import Running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Certificates


def mutual(certificates: Certificates) -> dict[str, Any]:
    """Settings of a listener that asks for client certificates."""
    return {
        "tls_cert_file": certificates.server,
        "tls_key_file": certificates.server_key,
        "tls_client_ca_file": certificates.authority,
    }


@asynccontextmanager
async def connected(gateway: Running, certificates: Certificates, name: str, names: str) -> AsyncIterator[Running]:
    """Over a channel of a client whose certificate has this common name and these alternative names."""
    certificate, key = certificates.sign(name, names)
    credentials = grpc.ssl_channel_credentials(
        certificates.authority.read_bytes(), key.read_bytes(), certificate.read_bytes()
    )
    async with aio.secure_channel(gateway.address, credentials) as channel:
        yield Running(gateway.gateway, channel)
