"""The transport before raw sockets: connections that are kept, closed, refused to the next request, canceled, slow."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import httpx
import pytest

from deltawire_server.upstream.transport import client as client_module
from deltawire_server.upstream.transport import exchange
from deltawire_server.upstream.transport.connection import SLICE_BYTES, Connection
from deltawire_server.upstream.transport.errors import ConnectionLostError, ProtocolViolationError
from tests.upstream.transport.peer import CHUNKED, HELLO, OK, Origin, Peer, client, origin
from tests.upstream.transport.test_exchange import WRONG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def server() -> AsyncIterator[Origin]:
    """An origin."""
    async with origin() as server:
        yield server


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client."""
    async with client() as http:
        yield http


async def begun(http: httpx.AsyncClient, server: Origin) -> httpx.Response:
    """A response that is not read."""
    return await http.send(http.build_request("GET", server.url), stream=True)


async def answered(server: Origin, peer: Peer | None = None, response: bytes = HELLO) -> Peer:
    """Answer one request, on a new connection or on this one."""
    peer = peer or await server.accept()
    await peer.request()
    peer.send(response)
    return peer


async def failure_of(asking: asyncio.Task[httpx.Response]) -> tuple[bytes, httpx.TransportError]:
    """What came of a response's body, and how it failed."""
    body = b""
    try:
        async for piece in (await asking).aiter_raw():
            body += piece
    except httpx.TransportError as error:
        return body, error
    raise AssertionError("it did not fail")


async def test_what_is_sent(server: Origin, http: httpx.AsyncClient) -> None:
    """The head as httpx has it, then the body with its length."""
    asking = asyncio.create_task(http.post(server.url + "?q=%2F a", content=b"body", headers={"x-name": "value"}))
    peer = await server.accept()
    head, _, body = (await peer.request()).partition(b"\r\n\r\n")
    peer.send(HELLO)
    assert (await asking).text == "hello"
    line, *headers = head.split(b"\r\n")
    assert line == b"POST /path?q=%2F%20a HTTP/1.1"
    names = {header.partition(b": ")[0].lower(): header.partition(b": ")[2] for header in headers}
    assert names[b"host"] == f"127.0.0.1:{server.port}".encode()
    assert names[b"content-length"] == b"4"
    assert names[b"x-name"] == b"value"
    assert body == b"body"


@pytest.mark.parametrize("value", [b"a\r\nx-forged: b", b"a\nb", b"a\rb", b"a\0b", b"a\r"])
async def test_a_header_cannot_begin_another(server: Origin, http: httpx.AsyncClient, value: bytes) -> None:
    """Nothing is sent."""
    with pytest.raises(httpx.LocalProtocolError):
        await http.get(server.url, headers=[(b"x-name", value)])
    assert server.accepted.empty()


async def test_a_body_without_a_length_is_refused(server: Origin, http: httpx.AsyncClient) -> None:
    """Nothing of this process sends one."""

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    with pytest.raises(httpx.LocalProtocolError):
        await http.post(server.url, content=body())


async def test_one_connection_serves_a_thousand_requests(server: Origin, http: httpx.AsyncClient) -> None:
    """One after the other."""

    async def serve() -> None:
        peer = await server.accept()
        while True:
            await peer.request()
            peer.send(HELLO)

    serving = asyncio.create_task(serve())
    for _ in range(1000):
        assert (await http.get(server.url)).content == b"hello"
    serving.cancel()
    assert len(server.peers) == 1


async def test_the_connection_used_last_is_used_next(server: Origin, http: httpx.AsyncClient) -> None:
    """The other stays idle, and can expire."""
    first = asyncio.create_task(http.get(server.url))
    one = await answered(server, response=b"")
    second = asyncio.create_task(http.get(server.url))
    two = await answered(server)
    await second
    one.send(HELLO)
    await first
    for _ in range(3):
        third = asyncio.create_task(http.get(server.url))
        await answered(server, one)
        await third
    assert len(server.peers) == 2
    assert not two.reader.at_eof()


@pytest.mark.parametrize("data", [HELLO, b"HTTP/1.1 408 Timeout\r\n\r\n", b"x", b"\r\n", b""], ids=repr)
@pytest.mark.parametrize("turns", range(6))
async def test_what_arrives_on_an_idle_connection_reaches_no_request(
    server: Origin, http: httpx.AsyncClient, data: bytes, turns: int
) -> None:
    """Nor does the end of it (no data): the connection is closed, at whichever turn of the loop the request comes."""
    for _ in range(5):
        asking = asyncio.create_task(http.get(server.url))
        peer = await answered(server)
        assert (await asking).content == b"hello"
        # Straight into the kernel: what the loops of the two sides have not seen yet counts as well.
        sock = socket.socket(fileno=socket.dup(peer.writer.get_extra_info("socket").fileno()))
        if data:
            sock.send(data)
        else:
            sock.shutdown(socket.SHUT_WR)
        sock.close()
        for _ in range(turns):
            await asyncio.sleep(0)
        asking = asyncio.create_task(http.get(server.url))
        other = await answered(server, response=OK + b"content-length: 4\r\n\r\nmine")
        assert other is not peer
        assert (await asking).content == b"mine"
        await peer.closed()
        other.close()


@pytest.mark.parametrize("surplus", [HELLO, b"x", OK])
async def test_two_responses_to_one_request(server: Origin, http: httpx.AsyncClient, surplus: bytes) -> None:
    """The first counts, the connection is not used again."""
    for _ in range(3):
        asking = asyncio.create_task(http.get(server.url))
        peer = await answered(server, response=HELLO + surplus)
        assert (await asking).content == b"hello"
        await peer.closed()


async def test_a_server_that_speaks_first(server: Origin, http: httpx.AsyncClient) -> None:
    """Is no HTTP server, whether its greeting comes before the request or after it."""
    for turns in range(8):
        asking = asyncio.create_task(http.get(server.url))
        for _ in range(turns):
            await asyncio.sleep(0)
        peer = await server.accept()
        peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")
        with pytest.raises(ProtocolViolationError):
            await asking
        await peer.closed()


async def test_an_idle_connection_expires(
    server: Origin, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next request opens another."""
    monkeypatch.setattr(client_module, "KEEPALIVE_SECONDS", 0.02)
    for _ in range(2):
        asking = asyncio.create_task(http.get(server.url))
        peer = await answered(server)
        await asking
        await peer.closed()


@pytest.mark.parametrize(("data", "name"), [(data, name) for name, (data, _) in WRONG.items()], ids=WRONG)
async def test_a_wrong_response_fails_at_once(server: Origin, http: httpx.AsyncClient, data: bytes, name: str) -> None:
    """With what came before the fault delivered, and the connection closed. No time limit is set."""
    expected = WRONG[name][1]
    asking = asyncio.create_task(begun(http, server))
    peer = await answered(server, response=data)
    if "ConnectionLost" in expected.error:
        peer.close()
    body, error = await failure_of(asking)
    assert f"{type(error).__name__}: {error}" == expected.error
    assert body == expected.body
    await peer.closed()


@pytest.mark.parametrize("kind", ["chunk extension", "trailers", "1xx", "head"])
async def test_a_response_without_end_is_bounded(server: Origin, http: httpx.AsyncClient, kind: str) -> None:
    """However fast the server sends: it is read for well under a megabyte."""
    begin, more = {
        "chunk extension": (CHUNKED + b"1;", b"x" * 65536),
        "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 10000),
        "1xx": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        "head": (OK, b"a: " + b"b" * 65536),
    }[kind]
    asking = asyncio.create_task(http.get(server.url))
    peer = await answered(server, response=begin)
    sent = 0
    while not asking.done():
        peer.send(more)
        sent += len(more)
        await asyncio.sleep(0)
        assert sent < 8 * 2**20
    with pytest.raises(ProtocolViolationError):
        await asking
    await peer.closed()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("response", [b"", b"HTTP/1.1 20", CHUNKED, CHUNKED + b"5\r\nhello\r\n"], ids=repr)
async def test_a_lost_connection(server: Origin, http: httpx.AsyncClient, response: bytes, how: str) -> None:
    """Is reported as such, with what had arrived."""
    asking = asyncio.create_task(begun(http, server))
    peer = await answered(server, response=response)
    if response.startswith(CHUNKED):
        await asking
    getattr(peer, how)()
    body, error = await failure_of(asking)
    assert isinstance(error, ConnectionLostError)
    # After a reset the kernel may have dropped what it had.
    assert body == (b"hello" if b"hello" in response else b"") or how == "reset"
    assert ("in the middle" in str(error)) is response.startswith(CHUNKED)


@pytest.mark.parametrize("stage", ["head", "body", "request"])
async def test_a_canceled_request_closes_its_connection_at_once(
    server: Origin, http: httpx.AsyncClient, stage: str
) -> None:
    """Within a turn of the loop; that is what makes an engine stop."""
    content = b"x" * 32 * 2**20 if stage == "request" else b""

    async def ask() -> None:
        async with http.stream("POST", server.url, content=content) as response:
            async for _ in response.aiter_raw():
                arrived.set()

    arrived = asyncio.Event()
    asking = asyncio.create_task(ask())
    peer = await server.accept()
    if stage == "request":
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    else:
        await peer.request()
    if stage == "body":
        peer.send(CHUNKED + b"2\r\nhi\r\n")
        await arrived.wait()
    before = _established(server.port)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0)
    assert before == 1
    assert _established(server.port) == 0
    await peer.closed()


def _established(port: int) -> int:
    """The kernel's count of open client sockets to a port on this machine."""
    with open("/proc/net/tcp", encoding="ascii") as table:  # noqa: PTH123
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(row[2] == f"0100007F:{port:04X}" and row[3] == "01" for row in rows)


async def test_leaving_a_response_closes_its_connection(server: Origin, http: httpx.AsyncClient) -> None:
    """Unless it has arrived as a whole."""
    asking = asyncio.create_task(begun(http, server))
    peer = await answered(server, response=CHUNKED + b"2\r\nhi\r\n")
    await (await asking).aclose()
    await peer.closed()
    asking = asyncio.create_task(begun(http, server))
    peer = await answered(server)
    response = await asking
    await response.aclose()
    asking = asyncio.create_task(begun(http, server))
    await answered(server, peer)
    assert await (await asking).aread() == b"hello"


async def test_closing_fails_what_is_under_way(server: Origin) -> None:
    """Idle connections are closed too."""
    async with client() as http:
        asking = asyncio.create_task(http.get(server.url))
        idle = await answered(server)
        await asking
        first = asyncio.create_task(http.get(server.url))
        await idle.request()
        second = asyncio.create_task(http.get(server.url))
        other = await server.accept()
        await other.request()
    for asking in (first, second):
        with pytest.raises(ConnectionLostError, match="the gateway closed the connection"):
            await asking
    await idle.closed()
    await other.closed()


async def test_more_requests_than_connections_wait(server: Origin) -> None:
    """In order; one that is canceled, fails or cannot connect gives its place back."""
    async with client(max_connections=2) as http:
        asking = [asyncio.create_task(http.get(server.url)) for _ in range(4)]
        one, two = await server.accept(), await server.accept()
        await asyncio.sleep(0.01)
        assert server.accepted.empty()
        asking[0].cancel()
        three = await server.accept()
        await two.request()
        two.close()
        four = await server.accept()
        for peer in (three, four):
            await answered(server, peer)
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(result) for result in results] == [
            asyncio.CancelledError,
            ConnectionLostError,
            httpx.Response,
            httpx.Response,
        ]
        await one.closed()
        timeout = httpx.Timeout(None, pool=0.01)
        held = [asyncio.create_task(begun(http, server)) for _ in range(2)]
        for peer in (three, four):
            await answered(server, peer, CHUNKED)
        with pytest.raises(httpx.PoolTimeout):
            await http.get(server.url, timeout=timeout)
        for response in held:
            await (await response).aclose()


async def test_a_canceled_connect_gives_its_place_back() -> None:
    """However many there are."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        async with client(max_connections=1) as http:
            async with asyncio.timeout(10):
                for _ in range(20):
                    asking = asyncio.create_task(http.get(f"http://127.0.0.1:{port}"))
                    await asyncio.sleep(0.001)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)


async def test_silence_ends_at_the_limit(server: Origin, http: httpx.AsyncClient) -> None:
    """If there is one, before the head and in the body; the connection is closed."""
    timeout = httpx.Timeout(None, read=0.03)
    for response in (b"", CHUNKED + b"2\r\nhi\r\n"):
        asking = asyncio.create_task(http.get(server.url, timeout=timeout))
        peer = await answered(server, response=response)
        with pytest.raises(httpx.ReadTimeout, match=r"it sent nothing for 0\.03 seconds"):
            await asking
        await peer.closed()


async def test_a_reader_that_does_not_read_stops_the_server(server: Origin, http: httpx.AsyncClient) -> None:
    """The bytes wait in the kernel and at the server; later everything arrives."""
    asking = asyncio.create_task(begun(http, server))
    peer = await answered(server, response=OK + b"content-length: %d\r\n\r\n" % (64 * 2**20))
    response = await asking
    for _ in range(64):
        peer.send(b"x" * 2**20)
    await asyncio.sleep(0.2)
    assert peer.writer.transport.get_write_buffer_size() > 40 * 2**20
    sizes = [len(piece) async for piece in response.aiter_raw()]
    assert sum(sizes) == 64 * 2**20
    assert max(sizes) <= exchange.HIGH_WATER_BYTES + 2 * 256 * 1024
    asking = asyncio.create_task(begun(http, server))
    await answered(server, peer)
    assert await (await asking).aread() == b"hello"


async def test_a_large_request_is_sent_as_the_server_takes_it(server: Origin, http: httpx.AsyncClient) -> None:
    """Not copied into a buffer as a whole, and complete."""
    content = bytes(range(256)) * (32 * 2**20 // 256)
    asking = asyncio.create_task(http.post(server.url, content=content))
    peer = await server.accept()
    got = (await peer.request()).partition(b"\r\n\r\n")[2]
    assert got == content
    peer.send(HELLO)
    assert (await asking).content == b"hello"
    asking = asyncio.create_task(http.get(server.url))
    await answered(server, peer)
    await asking


@pytest.mark.parametrize("length", [b"content-length: 2\r\n\r\n{}", b"connection: close\r\n\r\n{}"])
@pytest.mark.parametrize("wait", [True, False])
async def test_a_refusal_before_the_request_was_sent(
    server: Origin, http: httpx.AsyncClient, length: bytes, *, wait: bool
) -> None:
    """Arrives, though the server closes the connection with most of the request unread."""
    for _ in range(10):
        asking = asyncio.create_task(http.post(server.url, content=b"x" * 32 * 2**20))
        peer = await server.accept()
        await peer.reader.readuntil(b"\r\n\r\n")
        if wait:
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        peer.send(b"HTTP/1.1 413 Too Large\r\n" + length)
        peer.close()
        response = await asking
        assert (response.status_code, response.content) == (413, b"{}")


@pytest.mark.parametrize("length", [b"content-length: 2\r\n\r\n{}", b"connection: close\r\n\r\n{}"])
async def test_a_refusal_that_the_loop_had_not_read_when_sending_failed(
    server: Origin, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, length: bytes
) -> None:
    """The loop drops what the kernel still has when a send fails: it is read all the same."""
    made: list[Connection] = []
    made_before = Connection.connection_made

    def connection_made(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made.append(connection)
        made_before(connection, transport)

    monkeypatch.setattr(Connection, "connection_made", connection_made)
    asking = asyncio.create_task(http.post(server.url, content=b"x" * 32 * 2**20))
    peer = await server.accept()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.02)
    sock = peer.writer.get_extra_info("socket")
    with socket.socket(fileno=socket.dup(sock.fileno())) as behind_the_loop:
        behind_the_loop.send(b"HTTP/1.1 413 Too Large\r\n" + length)
        behind_the_loop.shutdown(socket.SHUT_WR)
    made[0].connection_lost(BrokenPipeError())
    response = await asking
    assert (response.status_code, response.content) == (413, b"{}")


async def test_other_statuses_than_errors_do_not_stop_the_request(server: Origin, http: httpx.AsyncClient) -> None:
    """A server may begin to answer before it has read all."""
    content = b"x" * 8 * 2**20
    asking = asyncio.create_task(http.post(server.url, content=content))
    peer = await server.accept()
    await peer.reader.readuntil(b"\r\n\r\n")
    peer.send(CHUNKED)
    assert len(await peer.reader.readexactly(len(content))) == len(content)
    peer.send(b"2\r\nhi\r\n0\r\n\r\n")
    assert (await asking).content == b"hi"


async def test_redirects_and_cookies_are_not_the_transports(server: Origin, http: httpx.AsyncClient) -> None:
    """A redirect is a response like any."""
    asking = asyncio.create_task(http.get(server.url))
    await answered(server, response=b"HTTP/1.1 307 Elsewhere\r\nlocation: /\r\ncontent-length: 0\r\n\r\n")
    assert (await asking).status_code == 307


async def test_a_server_that_reads_fast_leaves_others_their_turn(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each slice of a large body, also while the socket takes them all."""
    size = 32 * SLICE_BYTES
    waits = 0
    wait = exchange.Exchange.wait

    async def counted(self: exchange.Exchange) -> None:
        nonlocal waits
        waits += 1
        await wait(self)

    monkeypatch.setattr(exchange.Exchange, "wait", counted)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            accepted, _ = listening.accept()
            with accepted:
                left = size
                while left > 0:
                    left -= len(accepted.recv(1 << 20))
                accepted.sendall(HELLO)

        serving = asyncio.create_task(asyncio.to_thread(serve))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert (await http.post(url, content=bytes(size))).status_code == httpx.codes.OK
        await serving
    assert waits >= size // SLICE_BYTES - 1
