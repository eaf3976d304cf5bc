"""The certificates of the TLS listeners, which are read again while the gateway serves."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class ServerCertificates:
    """A server's certificate chain and key, and the authorities of client certificates.

    Args:
        cert_file: PEM file with the chain, leaf first.
        key_file: PEM file with its key, without a password.
        client_ca_file: PEM file with the authorities of client certificates, which are then required; `None` for no client
            certificates.

    Attributes:
        expiry: When the first certificate of the chain expires, as a Unix timestamp; 0 if the file does not show it.

    Raises:
        OSError: From the constructor: a file cannot be used.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None) -> None:
        self._cert_file = cert_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        self._contents = self._checked()
        self._configuration = _configuration(*self._contents)
        self.expiry = _first_expiry(self._contents[0])

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one listener. Each has its own, because gRPC asks for new certificates once for each listener."""
        used = self._configuration

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called in a thread of gRPC before each handshake; `None` if there is nothing new."""
            nonlocal used
            if self._configuration is used:
                return None
            used = self._configuration
            return used

        return _dynamic(self._configuration, fetch, require_client_authentication=self._client_ca_file is not None)

    def reload(self) -> bool:
        """Read the files again, for new connections; return whether they have changed.

        Raises:
            OSError: A file cannot be used, or the key is not that of the certificate. The old ones are still served.
        """
        contents = self._checked()
        if contents == self._contents:
            return False
        self._configuration = _configuration(*contents)
        self._contents = contents
        self.expiry = _first_expiry(contents[0])
        return True

    def _checked(self) -> tuple[bytes, bytes, bytes | None]:
        """The contents of the files, after a check that gRPC does not make: it fails each handshake instead."""
        contents = self._read()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for file in filter(None, (self._cert_file, self._client_ca_file)):
            try:
                context.load_verify_locations(file)
            except ssl.SSLError as error:
                raise OSError(f"{file} has no certificate in PEM") from error
        try:
            # The empty password prevents a prompt.
            context.load_cert_chain(self._cert_file, self._key_file, password="")
        except ssl.SSLError as error:
            mismatch = error.reason == "KEY_VALUES_MISMATCH"
            problem = f"is not that of {self._cert_file}" if mismatch else "has no unencrypted private key in PEM"
            raise OSError(f"the key {self._key_file} {problem}") from error
        if contents != self._read():
            raise OSError("they were replaced while they were read")
        return contents

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        authorities = None if self._client_ca_file is None else self._client_ca_file.read_bytes()
        return self._cert_file.read_bytes(), self._key_file.read_bytes(), authorities


def _first_expiry(chain: bytes) -> float:
    from cryptography import x509  # 5 MiB, which gateways without TLS do not need

    try:
        return min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(chain))
    except (
        ValueError,
        x509.InvalidVersion,
    ):  # OpenSSL, which gRPC and `_checked` use, reads more than the standard allows
        return 0.0


def _configuration(chain: bytes, key: bytes, authorities: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=authorities)


def _dynamic(
    initial: grpc.ServerCertificateConfiguration,
    fetch: Callable[[], grpc.ServerCertificateConfiguration | None],
    *,
    require_client_authentication: bool,
) -> grpc.ServerCredentials:
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        initial,
        fetch,  # type: ignore[arg-type]  # `None` is documented, and missing from the types
        require_client_authentication=require_client_authentication,
    )
    return credentials
