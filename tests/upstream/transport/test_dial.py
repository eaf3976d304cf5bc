"""Connections that cannot be opened, each with what is wrong in plain words; and of several addresses, the first."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deltawire_server.upstream.transport import dial
from deltawire_server.upstream.transport.connection import Connection
from deltawire_server.upstream.transport.errors import ConnectFailedError, ConnectionLostError, connect_failure
from tests.support.ports import free_port
from tests.upstream.transport.peer import HELLO, client, origin
from tests.upstream.transport.test_transport import answered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Certificates


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client."""
    async with client() as http:
        yield http


async def failure_of(http: httpx.AsyncClient, url: str) -> ConnectFailedError:
    """How a connection failed; no Python in what is said, and no address."""
    async with asyncio.timeout(10):
        with pytest.raises(ConnectFailedError) as caught:
            await http.get(url, timeout=httpx.Timeout(None, connect=1.0))
    message = str(caught.value)
    assert not re.search(r"Error|Errno|Exception|\[|_ssl|asyncio", message), message
    return caught.value


Place = tuple[str, int]


def resolving(monkeypatch: pytest.MonkeyPatch, *places: Place) -> None:
    """Let every name lead to these addresses."""
    found = [(socket.AF_INET6 if ":" in host else socket.AF_INET, 1, 6, "", (host, port)) for host, port in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


async def test_nothing_listens(http: httpx.AsyncClient) -> None:
    """Worth trying again."""
    error = await failure_of(http, f"http://127.0.0.1:{free_port()}")
    assert (str(error), error.misconfigured) == ("nothing listens at its address: the connection is refused", False)


async def test_names_that_do_not_resolve(http: httpx.AsyncClient) -> None:
    """Someone has to change the name; a label too long for the DNS never will resolve."""
    error = await failure_of(http, f"http://{'a' * 64}.example")
    assert (str(error), error.misconfigured) == ("its host name is invalid", True)


@pytest.mark.parametrize(
    ("number", "message", "misconfigured"),
    [
        (socket.EAI_NONAME, "its host name does not resolve", True),
        (socket.EAI_NODATA, "its host name does not resolve", True),
        (socket.EAI_AGAIN, "its host name cannot be looked up now", False),
        (socket.EAI_FAIL, "its host name cannot be looked up now", False),
    ],
)
async def test_what_the_resolver_says(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, number: int, message: str, *, misconfigured: bool
) -> None:
    """A name server that is away may be back soon."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(number, "words of the C library")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    error = await failure_of(http, "http://vllm.example")
    assert (str(error), error.misconfigured) == (message, misconfigured)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (113, "there is no route to its address"),
        (110, "its address does not respond"),
        (24, "connecting failed: too many open files"),
    ],
)
def test_what_the_operating_system_says(number: int, message: str) -> None:
    """All of these are worth trying again."""
    error = connect_failure(OSError(number, "Errno"))
    assert (str(error), error.misconfigured) == (message, False)


async def test_an_address_that_does_not_respond(http: httpx.AsyncClient) -> None:
    """Within the limit; the message says at what it was."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        place = full.getsockname()
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(place)
        error = await failure_of(http, f"http://127.0.0.1:{place[1]}")
        for filler in fillers:
            filler.close()
    assert (str(error), error.misconfigured) == ("its address did not respond within 1 seconds", False)


async def test_a_name_server_that_does_not_respond(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts within the same limit."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10))
    error = await failure_of(http, "http://vllm.example")
    over.set()
    assert (str(error), error.misconfigured) == ("its host name was not looked up within 1 seconds", False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_addresses_of_both_kinds(http: httpx.AsyncClient, host: str) -> None:
    """In a URL, an IPv6 address has brackets."""
    async with origin(host=host) as server:
        asking = asyncio.create_task(http.get(server.url))
        peer = await server.accept()
        assert f"host: {server.host}:{server.port}".encode() in (await peer.request()).lower()
        peer.send(HELLO)
        assert (await asking).text == "hello"


async def test_small_requests_are_sent_at_once() -> None:
    """Without Nagle's algorithm."""
    async with origin() as server:
        sock = await dial._connect((socket.AF_INET, ("127.0.0.1", server.port)), dial.open_socket)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sock.close()
        await server.accept()


async def test_the_next_address_is_tried_if_one_refuses(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; and if all do, that is the failure."""
    monkeypatch.setattr(dial, "HEAD_START_SECONDS", 3600)
    async with origin() as server:
        resolving(monkeypatch, ("::1", free_port()), ("127.0.0.1", free_port()), ("127.0.0.1", server.port))
        asking = asyncio.create_task(http.get("http://vllm.example"))
        await answered(server)
        assert (await asking).text == "hello"
    resolving(monkeypatch, ("::1", free_port()), ("127.0.0.1", free_port()))
    assert "refused" in str(await failure_of(http, "http://other.example"))


async def test_the_next_address_is_tried_beside_one_that_is_slow(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that accepts is used; the other connections are given up, also those that come just then."""
    connect = dial._connect
    slow: list[dial.Address] = []
    ended = 0

    async def connect_slowly(address: dial.Address, *_: object) -> socket.socket:
        nonlocal ended
        if address[0] is socket.AF_INET6:
            slow.append(address)
            try:
                await asyncio.Event().wait()
            finally:
                ended += 1
        return await connect(address, dial.open_socket)

    monkeypatch.setattr(dial, "_connect", connect_slowly)
    monkeypatch.setattr(dial, "HEAD_START_SECONDS", 0.01)
    async with origin() as server:
        resolving(monkeypatch, ("::1", 1), ("127.0.0.1", server.port), ("127.0.0.1", server.port))
        asking = asyncio.create_task(http.get("http://vllm.example"))
        await answered(server)
        assert (await asking).text == "hello"
        await asyncio.sleep(0)
    assert (len(slow), ended) == (1, 1)


async def test_two_addresses_that_accept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is used, the other socket is closed; and when the caller has gone, both."""
    sockets: list[socket.socket] = []
    go = asyncio.Event()

    async def connect(address: dial.Address, *_: object) -> socket.socket:
        await go.wait()
        sockets.append(socket.socket(address[0]))
        return sockets[-1]

    monkeypatch.setattr(dial, "_connect", connect)
    monkeypatch.setattr(dial, "HEAD_START_SECONDS", 0)
    addresses: list[dial.Address] = [(socket.AF_INET, ("127.0.0.1", port)) for port in (1, 2)]
    choosing = asyncio.create_task(dial._first(addresses, dial.open_socket))
    for _ in range(10):
        await asyncio.sleep(0)
    go.set()
    chosen = await choosing
    assert [sock.fileno() for sock in sockets if sock is not chosen] == [-1]
    chosen.close()
    go.clear()
    choosing = asyncio.create_task(dial._first(addresses, dial.open_socket))
    for _ in range(10):
        await asyncio.sleep(0)
    go.set()
    await asyncio.sleep(0)
    assert len(sockets) == 4
    choosing.cancel()
    await asyncio.gather(choosing, return_exceptions=True)
    for sock in sockets:
        assert sock.fileno() == -1


async def test_the_two_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the resolver."""
    resolving(monkeypatch, ("::1", 1), ("::2", 1), ("::3", 1), ("1.1.1.1", 1))
    hosts = [place[0] for _, place in await dial.look_up("vllm.example", 1)]
    assert hosts == ["::1", "1.1.1.1", "::2", "::3"]


async def test_closing_while_a_connection_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed as soon as it is open."""
    connect = dial._connect
    go = asyncio.Event()

    async def connect_later(*arguments: Any) -> socket.socket:  # noqa: ANN401 (those of the function it stands for)
        await go.wait()
        return await connect(*arguments)

    monkeypatch.setattr(dial, "_connect", connect_later)
    async with origin() as server:
        async with client() as http:
            asking = asyncio.create_task(http.get(server.url))
            await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(ConnectionLostError, match="the gateway closed the connection"):
            await asking
        await (await server.accept()).closed()


async def test_a_connection_that_ends_as_soon_as_it_is_open(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a request could be sent on it: its place is free again."""
    made = Connection.connection_made

    def made_and_ended(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made(connection, transport)
        asyncio.get_running_loop().call_soon(connection.eof_received)

    monkeypatch.setattr(Connection, "connection_made", made_and_ended)
    async with origin() as server:
        for _ in range(3):
            with pytest.raises(ConnectionLostError, match="it closed the connection before it responded"):
                await http.get(server.url)
            await (await server.accept()).closed()


async def test_the_operating_systems_own_time_limit(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no limit of ours."""

    async def connect(*_: object) -> socket.socket:
        raise OSError(errno.ETIMEDOUT, "Errno")

    monkeypatch.setattr(dial, "_connect", connect)
    assert str(await failure_of(http, "http://127.0.0.1")) == "its address does not respond"


async def test_a_burst_of_connections_is_one_look_up(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are spread over the addresses; after a failure, the name is looked up again."""
    look_ups = 0
    async with origin() as one, origin() as two:
        places = [("127.0.0.1", one.port), ("127.0.0.1", two.port)]

        def getaddrinfo(*_: object, **__: object) -> list[object]:
            nonlocal look_ups
            look_ups += 1
            return [(socket.AF_INET, 1, 6, "", place) for place in places]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        asking = [asyncio.create_task(http.get("http://vllm.example")) for _ in range(10)]
        for server in (one, two):
            for _ in range(5):
                await answered(server)
        assert {response.text for response in await asyncio.gather(*asking)} == {"hello"}
        assert look_ups == 1
    places = [("127.0.0.1", free_port())]
    for _ in range(3):
        with contextlib.suppress(httpx.TransportError):
            await http.get("http://vllm.example")
    assert look_ups >= 2


class Tls:
    """Certificates that are wrong in one way each, from one authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # Python requires it from 3.13 on
        self._run(
            "req", "-x509", *CURVE, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2", *usage
        )
        (folder / "ca.cnf").write_text(
            "[ca]\ndefault_ca=it\n[it]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\n"
            "policy=any\nunique_subject=no\nx509_extensions=names\n[any]\ncommonName=supplied\n"
            "[names]\nsubjectAltName=${ENV::NAMES}\nauthorityKeyIdentifier=keyid\n"
        )
        (folder / "index").touch()
        (folder / "serial").write_text("01\n")

    def _run(self, *arguments: str, names: str = "") -> None:
        environment = {**os.environ, "NAMES": names}
        subprocess.run(["openssl", *arguments], cwd=self.folder, env=environment, check=True, capture_output=True)

    def server(self, names: str, begin: str, end: str) -> ssl.SSLContext:
        """A server's side, with a certificate for these names, from and to these years."""
        self._run("req", *CURVE, "-keyout", "key", "-out", "csr", "-subj", "/CN=vllm")
        dates = ("-startdate", f"{begin}0101000000Z", "-enddate", f"{end}0101000000Z")
        signing = ("-config", "ca.cnf", "-batch", "-notext", "-keyfile", "ca.key", "-cert", "ca.pem")
        self._run("ca", *signing, "-in", "csr", "-out", "pem", *dates, names=names)
        return _serving(self.folder / "pem", self.folder / "key")

    def self_signed(self) -> ssl.SSLContext:
        """A server's side, with a certificate that it signed itself."""
        names = ("-subj", "/CN=vllm", "-addext", "subjectAltName=IP:127.0.0.1")
        self._run("req", "-x509", *CURVE, "-keyout", "key", "-out", "pem", *names, "-days", "2")
        return _serving(self.folder / "pem", self.folder / "key")

    def trusting(self) -> ssl.SSLContext:
        """A client's side that trusts the authority."""
        return ssl.create_default_context(cafile=self.folder / "ca.pem")


CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _serving(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Made by the openssl command."""
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(
    ("names", "begin", "end", "message"),
    [
        ("IP:127.0.0.1", "2020", "2021", "its certificate has expired"),
        ("IP:127.0.0.1", "2048", "2049", "its certificate is not valid yet"),
        ("IP:127.0.0.2", "2020", "2048", "its certificate is for another IP address"),
        ("DNS:vllm.example", "2020", "2048", "its certificate is for another IP address"),
        ("DNS:vllm.example", "2020", "2048", "its certificate is for another host"),
        ("", "", "", "its certificate is self-signed"),
    ],
)
async def test_certificates_that_are_wrong(tls: Tls, names: str, begin: str, end: str, message: str) -> None:
    """Each says what is wrong with it; someone has to change it."""
    context = tls.server(names, begin, end) if names else tls.self_signed()
    async with origin(context) as server, client(tls.trusting()) as http:
        host = "localhost" if message.endswith("host") else server.host
        error = await failure_of(http, f"https://{host}:{server.port}")
    assert (str(error), error.misconfigured) == (message, True)


async def test_an_authority_that_is_not_trusted(tls: Tls, certificates: Certificates) -> None:
    """Unless the operator accepts any certificate."""
    context = _serving(certificates.server, certificates.server_key)
    async with origin(context) as server:
        async with client(tls.trusting()) as http:
            error = await failure_of(http, server.url)
        async with client(tls=False) as http:
            asking = asyncio.create_task(http.get(server.url))
            await answered(server)
            assert (await asking).text == "hello"
    expected = "its certificate is signed by an authority that is not trusted here"
    assert (str(error), error.misconfigured) == (expected, True)


async def test_tls_of_the_right_host(certificates: Certificates) -> None:
    """By name and by address; kept connections work as without TLS, and so do large requests."""
    context = _serving(certificates.server, certificates.server_key)
    trusting = ssl.create_default_context(cafile=certificates.authority)
    async with origin(context) as server, client(trusting) as http:
        for host in ("localhost", "127.0.0.1"):
            peer = None
            for content in (b"", b"x" * 2**22, b""):
                asking = asyncio.create_task(http.post(f"https://{host}:{server.port}", content=content))
                peer = await answered(server, peer)
                assert (await asking).text == "hello"
        assert len(server.peers) == 2
        asking = asyncio.create_task(http.get(server.url))
        asking.cancel()


async def test_tls_by_the_systems_authorities(certificates: Certificates) -> None:
    """By default; this machine's own is none of them."""
    context = _serving(certificates.server, certificates.server_key)
    async with origin(context) as server, client(tls=True) as http:
        assert "certificate" in str(await failure_of(http, server.url))


async def test_tls_to_a_port_without_it() -> None:
    """Recognized by what such a server answers; one that only closes could be anything."""
    async with origin() as server, client() as http:
        for answer, message, misconfigured in (
            (
                b"HTTP/1.1 400 Bad Request\r\n\r\n",
                "it does not speak TLS at this port: use http, or another port",
                True,
            ),
            (b"", "it closed the connection during the TLS handshake", False),
        ):
            asking = asyncio.create_task(failure_of(http, server.url.replace("http:", "https:")))
            peer = await server.accept()
            await peer.reader.read(1)
            peer.send(answer)
            peer.close()
            error = await asking
            assert (str(error), error.misconfigured) == (message, misconfigured)


async def test_a_tls_handshake_without_end() -> None:
    """Counts within the limit for connecting."""
    async with origin() as server, client() as http:
        error = await failure_of(http, server.url.replace("http:", "https:"))
        assert (str(error), error.misconfigured) == ("the TLS handshake was not complete within 1 seconds", False)
        await (await server.accept()).closed()


async def test_no_tls_to_a_port_with_it() -> None:
    """Recognized by the alert that such a server sends."""
    async with origin() as server, client() as http:
        asking = asyncio.create_task(failure_of(http, server.url))
        peer = await server.accept()
        await peer.request()
        peer.send(b"\x15\x03\x03\x00\x02\x02\x46")
        peer.close()
        error = await asking
    assert (str(error), error.misconfigured) == ("it speaks TLS at this port: use https, or another port", True)


def _refuse(listener: socket.socket, context: ssl.SSLContext) -> None:
    """A handshake as OpenSSL does it, which sends alerts; asyncio's server closes without them."""
    accepted, _ = listener.accept()
    with context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False) as sock:
        with contextlib.suppress(OSError):
            sock.do_handshake()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_WR)
            while socket.socket.recv(sock, 65536):
                pass


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (ssl.TLSVersion.TLSv1_2, "the TLS handshake failed: sslv3 alert handshake failure"),
        (ssl.TLSVersion.TLSv1_3, "it requires a client certificate"),
    ],
)
async def test_a_server_that_requires_a_client_certificate(
    certificates: Certificates, version: ssl.TLSVersion, message: str
) -> None:
    """TLS 1.3 says so only after the handshake."""
    context = _serving(certificates.server, certificates.server_key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.authority)
    context.maximum_version = version
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = threading.Thread(target=_refuse, args=(listener, context))
        refusing.start()
        async with client(ssl.create_default_context(cafile=certificates.authority)) as http:
            error = await failure_of(http, f"https://127.0.0.1:{listener.getsockname()[1]}")
        await asyncio.to_thread(refusing.join)
    assert (str(error), error.misconfigured) == (message, True)
