"""Images from their addresses to bytes, over real sockets: every way to be led astray, or held up, on the way."""

# ruff: noqa: RUF001 -- look-alikes are what is tested

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.errors import CallerError, Code, Reason, Violation
from deltawire_server.images.connect import (
    NOWHERE,
    RefusedError,
    SystemNames,
    UnavailableError,
    validated_addresses,
    validated_socket,
)
from deltawire_server.images.load import FETCHES_OF_A_REQUEST, MAX_FETCHES, Images
from deltawire_server.images.policy import Policy
from deltawire_server.upstream.request import ChatMessage, ChatRequest, ImageData, ImageUrl, Role
from deltawire_server.upstream.transport.exchange import MAX_HEAD_BYTES, MAX_HEADERS
from deltawire_server.upstream.web_address import web_address
from tests.images.server import Answer, Names, Server, ok, redirect, web
from tests.support.gateway import until
from tests.support.images import IMAGES, JPEG, NO_IMAGES, PNG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from deltawire_server.images.addresses import IPAddress
    from tests.conftest import Certificates

HOME = "127.0.0.1"
HOST = "images.example"
PICTURE = ImageData(PNG, "image/png")
MISLED = "redirects to an address that images may not be fetched from"
LONG = 3600.0
SHORT = 0.2


def at_home(ip: IPAddress) -> bool:
    """Replaces the check for public addresses: only this address is public in these tests."""
    return ip == ip_address(HOME)


def field(index: int) -> str:
    """The field of a request's image."""
    return f"chat.messages[0].user.content[{index}].image.url"


def asking(*urls: str) -> ChatRequest:
    """A request with images at these addresses."""
    return ChatRequest(
        "m", (ChatMessage(Role.USER, tuple(ImageUrl(web_address(url), field(i)) for i, url in enumerate(urls))),)
    )


@asynccontextmanager
async def images_of(
    *servers: Server,
    names: Names | None = None,
    permits: Callable[[IPAddress], bool] = at_home,
    tls: ssl.SSLContext | bool = False,
    **policy: Any,  # noqa: ANN401 (whatever a policy has)
) -> AsyncIterator[Images]:
    """Images from any host at the servers' ports, whose name leads to this machine unless `names` say otherwise."""
    allowed = {"allowed_hosts": [f"*:{server.port}" for server in servers], "schemes": ("http", "https")}
    rules = Policy(**{"urls": "fetch", "timeout": LONG, **allowed, **policy})
    images = Images(rules, permits=permits, look_up=names or Names({HOST: [[HOME]]}), tls=tls, user_agent="gateway/1")
    try:
        yield images
    finally:
        await images.close()


async def loaded(images: Images, *urls: str) -> tuple[object, ...]:
    """The images at these addresses."""
    return (await images.load(asking(*urls))).messages[0].content


async def refusal(images: Images, *urls: str) -> tuple[Violation, ...]:
    """The violations by which these addresses are refused."""
    with pytest.raises(CallerError) as caught:
        await images.load(asking(*urls))
    assert caught.value.reason is Reason.INVALID_REQUEST
    return caught.value.violations


async def failure(images: Images, url: str, host: str = HOST) -> str:
    """The message for the caller of an image that cannot be fetched."""
    with pytest.raises(CallerError) as caught:
        await images.load(asking(url))
    assert caught.value.reason is Reason.IMAGE_UNAVAILABLE
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.metadata == {"field": field(0), "host": host}
    start = f"{field(0)}: the image at {host} "
    assert caught.value.message.startswith(start)
    return caught.value.message.removeprefix(start)


async def failure_of(answer: Answer, **policy: Any) -> str:  # noqa: ANN401 (whatever a policy has)
    """Why an image could not be fetched from a server that answers this."""
    async with web({"/a": answer}) as server, images_of(server, **policy) as images:
        said = await failure(images, f"http://{HOST}:{server.port}/a")
        await until(lambda: not server.open)
        return said


# Who fetches


async def test_addresses_are_refused_unless_the_operator_says_otherwise() -> None:
    """Each by its field, with the setting's name; nothing is looked up."""
    names = Names({HOST: [[HOME]]})
    images = Images(look_up=names)
    violations = await refusal(images, f"https://{HOST}/", "https://127.0.0.1/")
    assert [violation.field for violation in violations] == [field(0), field(1)]
    assert all("images.urls" in violation.description for violation in violations)
    assert not names.asked
    await images.close()


async def test_addresses_are_left_to_the_engine_if_the_operator_says_so() -> None:
    """As they are, whatever they are."""
    images = Images(Policy("pass"))
    request = asking("http://127.0.0.1/a.png")
    assert await images.load(request) is request
    await images.close()


@pytest.mark.parametrize("urls", ["refuse", "fetch", "pass"])
async def test_a_request_without_addresses_is_left_as_it_is(urls: Any) -> None:  # noqa: ANN401 (a literal)
    """Images that came with it need nothing."""
    images = Images(Policy(urls))
    request = ChatRequest("m", (ChatMessage(Role.USER, ("hi", PICTURE)),))
    assert await images.load(request) is request
    await images.close()


async def test_images_take_the_places_of_their_addresses() -> None:
    """In order, over all messages; the rest stays as it was."""
    answers = {f"/{kind}": ok(data) for kind, data in IMAGES.items()}
    async with web(answers) as server, images_of(server) as images:
        at = {kind: ImageUrl(web_address(f"http://{HOST}:{server.port}/{kind}"), "f") for kind in IMAGES}
        kinds = list(IMAGES)
        first = ChatMessage(Role.SYSTEM, ("x", at[kinds[0]], at[kinds[1]], "y"))
        second = ChatMessage(Role.TOOL, (at[kinds[2]], PICTURE, at[kinds[3]], at[kinds[4]]), call_id="c")
        request = await images.load(ChatRequest("m", (first, second), user="u"))
    data = {kind: ImageData(IMAGES[kind], kind) for kind in IMAGES}
    assert request == ChatRequest(
        "m",
        (
            ChatMessage(Role.SYSTEM, ("x", data[kinds[0]], data[kinds[1]], "y")),
            ChatMessage(Role.TOOL, (data[kinds[2]], PICTURE, data[kinds[3]], data[kinds[4]]), call_id="c"),
        ),
        user="u",
    )


# What goes along


async def test_what_a_server_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs and nothing else: no credentials, cookies, referrer; and no proxy is asked, whatever the environment says."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    answers = {"/a?b=%41%2f&c": redirect("/b"), "/b": ok(PNG, "Set-Cookie: c=d; Path=/")}
    async with web(answers) as server, images_of(server) as images:
        for _ in range(2):
            await loaded(images, f"http://{HOST}:{server.port}/a?b=%41%2f&c#d")
    assert server.targets == ["/a?b=%41%2f&c", "/b"] * 2
    assert server.connections == 4, "connections are not kept"
    for head in server.heads:
        lines = head.rstrip().split("\r\n")[1:]
        headers = dict(line.lower().split(": ", 1) for line in lines)
        assert headers == {
            "host": f"{HOST}:{server.port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "gateway/1",
            **({"connection": "close"} if "connection" in headers else {}),
        }


@pytest.mark.parametrize("target", ["/../a", "/a/%2e%2e/b", "/%E4", "//a", "/?", "/a?b?c", "/a%00"])
async def test_the_target_is_sent_as_it_was_judged(target: str) -> None:
    """The path is sent without further normalization."""
    async with web({target: ok(PNG)}) as server, images_of(server) as images:
        assert await loaded(images, f"http://{HOST}:{server.port}{target}") == (PICTURE,)


# Where it leads


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.2", "10.0.0.1", "169.254.169.254", "168.63.129.16", "0.0.0.0", "①⑥⑨.②⑤④.①⑥⑨.②⑤④"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[fd00:ec2::254]"),
        *("localhost", "LOCALHOST.", "printer.local", "metadata.google.internal", "metadata", "ｌｏｃａｌｈｏｓｔ"),
        *("away.example", "inside.example", "half.example", "metadata.example", "mapped.example", "v6.example"),
    ],
)
async def test_what_is_inside_cannot_be_told_from_what_is_not_there(host: str) -> None:
    """Addresses, names that lead there, names with one such among their addresses, and names that do not exist at all."""
    names = Names(
        {
            "inside.example": [["10.0.0.1"]],
            "half.example": [[HOME, "10.0.0.1"]],
            "metadata.example": [["169.254.169.254"]],
            "mapped.example": [["::ffff:127.0.0.1"]],
            "v6.example": [[HOME, "fd00::1"]],
        }
    )
    async with web({"/": ok(PNG)}) as server, images_of(server, names=names) as images:
        assert await refusal(images, f"http://{host}:{server.port}/") == (Violation(field(0), NOWHERE),)
        assert server.connections == 0


async def test_the_real_judge_refuses_this_machine() -> None:
    """Without the seam of the tests, an address or a name that leads here is refused, with any host allowed."""
    async with web({"/": ok(PNG)}) as server:
        policy = Policy("fetch", [f"*:{server.port}"], ("http",))
        images = Images(policy, look_up=Names({HOST: [[HOME]]}))
        for host in (HOST, HOME):
            assert await refusal(images, f"http://{host}:{server.port}/") == (Violation(field(0), NOWHERE),)
        await images.close()
        assert server.connections == 0


async def test_rebinding() -> None:
    """A name is looked up once for each connection, and that is where it goes: what a second answer says does not matter."""
    names = Names({HOST: [[HOME], ["10.0.0.1"]]})
    async with web({"/": ok(PNG)}) as server, images_of(server, names=names) as images:
        url = f"http://{HOST}:{server.port}/"
        assert await loaded(images, url) == (PICTURE,)
        assert names.asked == [HOST]
        # And nothing is remembered: the next time, it leads elsewhere.
        assert await refusal(images, url) == (Violation(field(0), NOWHERE),)
        assert names.asked == [HOST, HOST]


async def test_rebinding_within_redirects() -> None:
    """Each redirect is resolved and checked, even to the same host."""
    names = Names({HOST: [[HOME], ["10.0.0.1"]]})
    async with web({"/": redirect("/b"), "/b": ok(PNG)}) as server, images_of(server, names=names) as images:
        assert await refusal(images, f"http://{HOST}:{server.port}/") == (Violation(field(0), MISLED),)
        assert server.targets == ["/"]


async def test_a_name_with_several_addresses() -> None:
    """One that does not answer is passed over for one that does."""
    names = Names({HOST: [["127.0.0.3", HOME]]})
    homes = {ip_address("127.0.0.3"), ip_address(HOME)}
    async with web({"/": ok(PNG)}) as server, images_of(server, names=names, permits=homes.__contains__) as images:
        assert await loaded(images, f"http://{HOST}:{server.port}/") == (PICTURE,)


@pytest.mark.parametrize("host", [HOST, HOME])
async def test_a_socket_is_judged_again_just_before_it_connects(host: str) -> None:
    """So that nothing in between, or a library's short cut for IP addresses, can lead elsewhere."""
    verdicts = iter([True, False])
    async with web({"/": ok(PNG)}) as server, images_of(server, permits=lambda _: next(verdicts)) as images:
        assert await failure(images, f"http://{host}:{server.port}/", host) == "cannot be reached"
        assert server.connections == 0


def test_sockets_are_for_validated_addresses() -> None:
    """Of both families."""
    with validated_socket(at_home, (socket.AF_INET, (HOME, 80))) as made:
        assert made.family is socket.AF_INET
    with validated_socket(lambda _: True, (socket.AF_INET6, ("::1", 80))) as made:
        assert made.family is socket.AF_INET6
    for place in (("127.0.0.2", 80), ("::1", 80, 0, 0), ("fe80::1%1", 80, 0, 1)):
        with pytest.raises(PermissionError):
            validated_socket(at_home, (socket.AF_INET6, place))


async def test_addresses_of_both_families() -> None:
    """In the order of the look-up, with the port."""
    ips: Sequence[str] = ("8.8.8.8", "2606:4700::1111")
    address = web_address(f"https://{HOST}/")
    assert await validated_addresses(Names({HOST: [ips]}), lambda _: True, address) == [
        (socket.AF_INET, ("8.8.8.8", 443)),
        (socket.AF_INET6, ("2606:4700::1111", 443)),
    ]


async def test_a_name_that_is_nowhere() -> None:
    """Is refused as one that leads inside is."""
    with pytest.raises(RefusedError, match=NOWHERE):
        await validated_addresses(Names({}), at_home, web_address(f"https://{HOST}/"))


async def test_the_operating_systems_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved with a final dot, so that no search list applies; each address is returned once."""
    asked: list[str] = []

    def getaddrinfo(host: str, _port: None, **_: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        asked.append(host)
        if host.startswith("away"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        if host.startswith("slow"):
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 0))] * 2

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    names = SystemNames()
    assert await names("images.example") == (ip_address("8.8.8.8"),)
    assert await names("away.example") == ()
    with pytest.raises(UnavailableError, match="cannot be looked up now"):
        await names("slow.example")
    names.close()
    assert asked == ["images.example.", "away.example.", "slow.example."]


async def test_names_are_looked_up_by_the_operating_system_by_default() -> None:
    """With nothing injected; a name that is nowhere by definition needs no network."""
    images = Images(Policy("fetch", ["*"]))
    with pytest.raises(CallerError) as caught:
        await images.load(asking("https://images.invalid/"))
    assert caught.value.reason in (Reason.INVALID_REQUEST, Reason.IMAGE_UNAVAILABLE)
    await images.close()


async def test_hosts_that_are_not_allowed_are_not_even_looked_up() -> None:
    """Every address is returned at once."""
    names = Names({HOST: [[HOME]]})
    async with images_of(names=names, allowed_hosts=["a.example"], schemes=("https",)) as images:
        violations = await refusal(
            images, f"https://{HOST}/", "https://a.example/", "http://a.example/", "https://127.0.0.1/"
        )
    assert [violation.field for violation in violations] == [field(0), field(2), field(3)]
    assert not names.asked


async def test_an_allowed_host_inside_is_refused_all_the_same() -> None:
    """An operator's list adds nothing to what is public."""
    names = Names({"intranet.example": [["10.0.0.1"]]})
    async with images_of(names=names, allowed_hosts=["intranet.example", "10.0.0.1"]) as images:
        for url in ("https://intranet.example/", "https://10.0.0.1/"):
            assert await refusal(images, url) == (Violation(field(0), NOWHERE),)


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status: int) -> None:
    """To another place at the host, and to another host."""
    async with web({"/there/b": redirect("c", status), "/there/c": ok(PNG)}) as there:
        elsewhere = f"//other.example:{there.port}/there/b"
        names = Names({HOST: [[HOME]], "other.example": [[HOME]]})
        async with web({"/a": redirect(elsewhere, status)}) as here, images_of(here, there, names=names) as images:
            assert await loaded(images, f"http://{HOST}:{here.port}/a") == (PICTURE,)
            assert names.asked == [HOST, "other.example", "other.example"]


@pytest.mark.parametrize(
    "location",
    [
        *("http://127.0.0.2:PORT/", "http://10.0.0.1:PORT/", "http://169.254.169.254:PORT/latest/meta-data/"),
        *("http://[::1]:PORT/", "http://[::ffff:127.0.0.1]:PORT/", "http://2130706433:PORT/", "http://0:PORT/"),
        *(
            "http://localhost:PORT/",
            "http://inside.example:PORT/",
            "http://away.example:PORT/",
            "//inside.example:PORT/",
        ),
        *("http://images.example/", "http://images.example:22/", "https://images.example/"),
        *("file:///etc/passwd", "ftp://images.example:PORT/", "gopher://images.example:PORT/_", "javascript:alert(1)"),
        *(
            "data:image/png;base64,iVBORw0KGgo=",
            "http://a@images.example:PORT/",
            "http://images.example:PORT@10.0.0.1/",
        ),
        *(
            "http://images.example:PORT\\@10.0.0.1/",
            "\\\\10.0.0.1\\a",
            "http://[",
            "http://[10.0.0.1]/",
            "/a b",
            "/a\tb",
        ),
        *("http:///10.0.0.1/", "http:/a", "http:a", "//[::1", "//10.0.0.1:PORT/", "http://images.example:PORT/\u202e"),
    ],
)
async def test_redirects_that_lead_astray(location: str) -> None:
    """To what is inside, another scheme, another port, or what programs read in several ways: all in the same words."""
    names = Names({HOST: [[HOME]], "inside.example": [["10.0.0.1"]]})
    async with web({}) as server, images_of(server, names=names) as images:
        server.answers["/"] = redirect(location.replace("PORT", str(server.port)))
        assert await refusal(images, f"http://{HOST}:{server.port}/") == (Violation(field(0), MISLED),)
        assert server.targets == ["/"]


async def test_a_redirect_from_https_to_http_is_refused_where_http_is() -> None:
    """By the schemes that the operator allows, at each hop."""
    async with web({}) as server, images_of(server, schemes=("http",)) as images:
        server.answers["/"] = redirect(f"https://{HOST}:{server.port}/b")
        assert await refusal(images, f"http://{HOST}:{server.port}/") == (Violation(field(0), MISLED),)


@pytest.mark.parametrize(("limit", "asked"), [(0, 1), (3, 4)])
async def test_redirects_in_a_circle(limit: int, asked: int) -> None:
    """End after the number that the operator allows."""
    answers = {"/a": redirect("/b"), "/b": redirect("/a")}
    async with web(answers) as server, images_of(server, max_redirects=limit) as images:
        assert await failure(images, f"http://{HOST}:{server.port}/a") == f"redirects more than {limit} times"
        assert len(server.heads) == asked


async def test_as_many_redirects_as_are_allowed() -> None:
    """Three of three."""
    answers = {"/a": redirect("/b"), "/b": redirect("/c"), "/c": redirect("/d"), "/d": ok(PNG)}
    async with web(answers) as server, images_of(server, max_redirects=3) as images:
        assert await loaded(images, f"http://{HOST}:{server.port}/a") == (PICTURE,)


# What comes back


BOMB = gzip.compress(bytes(50_000_000))

FAILURES = {
    "not there": (Answer(b"HTTP/1.1 404 Not Found\r\n\r\n" + PNG), "was answered with HTTP status 404"),
    "an error": (Answer(b"HTTP/1.1 500 Oops\r\n\r\n" + PNG), "was answered with HTTP status 500"),
    "a part": (Answer(b"HTTP/1.1 206 Partial\r\n\r\n" + PNG), "was answered with HTTP status 206"),
    "nothing new": (Answer(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "was answered with HTTP status 304"),
    "no content": (Answer(b"HTTP/1.1 204 No Content\r\n\r\n"), "was answered with HTTP status 204"),
    "a redirect to nowhere": (redirect(""), "redirects to nowhere"),
    "empty": (ok(b""), "is not a PNG, JPEG, GIF, WebP or BMP file"),
    "gzip": (ok(gzip.compress(PNG), "Content-Encoding: gzip"), "was sent compressed, which the request did not allow"),
    "gzip bomb": (ok(BOMB, "Content-Encoding: GZIP"), "was sent compressed, which the request did not allow"),
    "gzip bomb, undeclared": (ok(BOMB), "is not a PNG, JPEG, GIF, WebP or BMP file"),
    "another encoding": (ok(PNG, "Content-Encoding: br"), "was sent compressed, which the request did not allow"),
    "declared as a page": (ok(PNG, "Content-Type: text/html"), "is declared as 'text/html' and not as an image"),
    "declared as JSON": (
        ok(PNG, "Content-Type: application/json; charset=utf-8"),
        "is declared as 'application/json' and not as an image",
    ),
    "too long by its length": (
        Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n", hold=True),
        "holds more than 100000 bytes, the most of an image",
    ),
    "endless": (Answer(b"HTTP/1.1 200 OK\r\n\r\n" + PNG, endless=bytes(9999)), "holds more than 100000 bytes"),
    "endless in chunks": (
        Answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", endless=b"4\r\naaaa\r\n" * 1000),
        "holds more than 100000 bytes",
    ),
    "shorter than its length": (Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + PNG), "broke off"),
    "a chunk that breaks off": (
        Answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + PNG),
        "broke off",
    ),
    "longer than its length": (
        Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + PNG),
        "is not a PNG",
    ),
    "two lengths": (
        Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n" + PNG),
        "was not answered with valid HTTP",
    ),
    "a length below zero": (
        Answer(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + PNG),
        "was not answered with valid HTTP",
    ),
    "HTTP/0.9": (Answer(PNG), "was not answered with valid HTTP"),
    "another protocol": (Answer(b"SSH-2.0-OpenSSH_9.6\r\n", hold=True), "was not answered with valid HTTP"),
    "a database": (Answer(b"-ERR unknown command 'GET'\r\n", hold=True), "was not answered with valid HTTP"),
    "nothing at all": (Answer(b""), "was not answered with valid HTTP"),
    "half a head": (Answer(b"HTTP/1.1 200 OK\r\nContent-"), "was not answered with valid HTTP"),
    "a long header": (
        ok(PNG, f"X-Long: {'a' * MAX_HEAD_BYTES}"),
        "was not answered with valid HTTP",
    ),
    "many headers": (ok(PNG, *["X-Many: a"] * (MAX_HEADERS + 1)), "was not answered with valid HTTP"),
    "endless headers": (
        Answer(b"HTTP/1.1 200 OK\r\n", endless=b"X-Many: a\r\n" * 100),
        "was not answered with valid HTTP",
    ),
    "endless interim answers": (
        Answer(b"HTTP/1.1 102 Processing\r\n\r\n", endless=b"HTTP/1.1 102 Processing\r\n\r\n"),
        "was not answered with valid HTTP",
    ),
    "an endless header": (Answer(b"HTTP/1.1 200 OK\r\nX: ", endless=b"a" * 9999), "was not answered with valid HTTP"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_answers_that_are_no_image(name: str) -> None:
    """Each has a short message, is not read longer than necessary, and its connection is closed."""
    answer, said = FAILURES[name]
    assert (await failure_of(answer, max_image_bytes=100_000)).startswith(said)


@pytest.mark.parametrize("name", NO_IMAGES)
@pytest.mark.parametrize("declared", ["image/png", "image/svg+xml", "application/octet-stream"])
async def test_bytes_decide_that_it_is_none(name: str, declared: str) -> None:
    """The declared type has no effect; the message does not name the contents, which may be confidential."""
    said = await failure_of(ok(NO_IMAGES[name], f"Content-Type: {declared}"))
    assert said == "is not a PNG, JPEG, GIF, WebP or BMP file"


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Content-Type: image/png",),
        ("Content-Type: IMAGE/JPEG; q=1",),
        ("Content-Type: text/html", "Content-Type: image/png")[1:],
        ("Content-Type: application/octet-stream",),
        ("Content-Type: binary/octet-stream",),
        ("Content-Encoding: identity",),
        ("Connection: keep-alive", "Keep-Alive: timeout=3600"),
    ],
)
async def test_answers_that_are_an_image(headers: tuple[str, ...]) -> None:
    """By their bytes, whatever kind is declared; a connection that the server would keep is closed."""
    async with web({"/": ok(PNG, *headers, hold=True)}) as server, images_of(server) as images:
        assert await loaded(images, f"http://{HOST}:{server.port}/") == (PICTURE,)
        await until(lambda: not server.open)


async def test_an_image_in_chunks_without_a_length() -> None:
    """As servers send what they make while they send it."""
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in PNG) + b"0\r\n\r\n"
    answer = Answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    async with web({"/": answer}) as server, images_of(server) as images:
        assert await loaded(images, f"http://{HOST}:{server.port}/") == (PICTURE,)


async def test_size() -> None:
    """To the byte, by the declared length and without one."""
    plain = Answer(b"HTTP/1.0 200 OK\r\n\r\n" + PNG)
    for answer in (ok(PNG), plain):
        async with web({"/": answer}) as server:
            url = f"http://{HOST}:{server.port}/"
            async with images_of(server, max_image_bytes=len(PNG)) as images:
                assert await loaded(images, url) == (PICTURE,)
            async with images_of(server, max_image_bytes=len(PNG) - 1) as images:
                said = f"holds more than {len(PNG) - 1} bytes, the most of an image"
                assert await failure(images, url) == said


async def test_size_of_all() -> None:
    """Counted as they come, whatever lengths are declared."""
    async with web({"/": ok(PNG)}) as server:
        url = f"http://{HOST}:{server.port}/"
        async with images_of(server, max_fetched_bytes=2 * len(PNG)) as images:
            assert await loaded(images, url, url) == (PICTURE, PICTURE)
            with pytest.raises(CallerError, match=f"makes more than {2 * len(PNG)} bytes with the request's others"):
                await images.load(asking(url, url, url))
            assert await loaded(images, url) == (PICTURE,), "each request has its own"


# Time


SLOW = {
    "silent": Answer(b"", hold=True),
    "silent after half a head": Answer(b"HTTP/1.1 200 OK\r\nContent-", hold=True),
    "silent after the head": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", hold=True),
    "silent after half a body": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + PNG[:9], hold=True),
    "kept open without a length": Answer(b"HTTP/1.1 200 OK\r\n\r\n" + PNG, hold=True),
    "dripping chunks": Answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", endless=b"1\r\na\r\n"),
    "redirects to itself": redirect("/a"),
}


@pytest.mark.parametrize("name", SLOW)
async def test_slow_answers(name: str) -> None:
    """End when the time for the whole image is over, however busy the server looks."""
    said = await failure_of(SLOW[name], timeout=SHORT, max_redirects=10**9)
    assert said == f"took longer than {SHORT:g} seconds"


async def test_slow_names() -> None:
    """Count into the same time."""

    async def look_up(_: str) -> list[IPAddress]:
        await asyncio.Event().wait()
        raise AssertionError

    policy = Policy("fetch", ["*"], timeout=SHORT)
    images = Images(policy, look_up=look_up, tls=False)
    assert await failure(images, f"https://{HOST}/") == f"took longer than {SHORT:g} seconds"
    await images.close()


async def test_nobody_listens() -> None:
    """The message of a refused connection does not have its address."""
    with socket.socket() as reserved:
        reserved.bind((HOME, 0))  # without listening
        port = reserved.getsockname()[1]
        async with images_of(allowed_hosts=[f"*:{port}"]) as images:
            assert await failure(images, f"http://{HOST}:{port}/") == "cannot be reached"


async def test_cancelling() -> None:
    """Ends what is under way, with its connection."""
    async with web({"/": SLOW["silent"]}) as server, images_of(server) as images:
        task = asyncio.create_task(images.load(asking(*[f"http://{HOST}:{server.port}/"] * 3)))
        await until(lambda: len(server.heads) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not server.open)


async def test_the_first_failure_ends_the_others() -> None:
    """The caller need not wait for what it gets no more."""
    async with web({"/slow": SLOW["silent"]}) as server, images_of(server) as images:
        url = f"http://{HOST}:{server.port}/"
        with pytest.raises(CallerError) as caught:
            await images.load(asking(f"{url}slow", f"{url}away"))
        assert caught.value.metadata["field"] == field(1)
        await until(lambda: not server.open)


async def test_a_request_fetches_a_few_at_once() -> None:
    """And all of them in the end."""
    async with web({"/": ok(PNG)}) as server, images_of(server) as images:
        server.gate = asyncio.Event()
        urls = [f"http://{HOST}:{server.port}/"] * (2 * FETCHES_OF_A_REQUEST + 1)
        task = asyncio.create_task(loaded(images, *urls))
        await until(lambda: len(server.heads) == FETCHES_OF_A_REQUEST)
        server.gate.set()
        assert await task == (PICTURE,) * len(urls)
    assert server.most == FETCHES_OF_A_REQUEST


async def test_all_requests_together_fetch_so_many_at_once() -> None:
    """More requests wait for their turn; the time for an image does not run while it waits."""
    async with web({"/": ok(PNG)}) as server, images_of(server) as images:
        server.gate = asyncio.Event()
        urls = [f"http://{HOST}:{server.port}/"] * FETCHES_OF_A_REQUEST
        count = MAX_FETCHES // FETCHES_OF_A_REQUEST + 2
        tasks = [asyncio.create_task(loaded(images, *urls)) for _ in range(count)]
        await until(lambda: len(server.heads) == MAX_FETCHES)
        server.gate.set()
        assert await asyncio.gather(*tasks) == [(PICTURE,) * FETCHES_OF_A_REQUEST] * count
    assert server.most == MAX_FETCHES


# TLS


async def test_certificates_are_verified(certificates: Certificates) -> None:
    """The certificate is checked for the requested name, although the connection uses a checked address."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates.server, certificates.server_key)
    trusting = ssl.create_default_context(cafile=certificates.authority)
    async with web({"/": ok(JPEG)}, tls) as server:
        async with images_of(server, tls=trusting) as images:
            assert await loaded(images, f"https://{HOME}:{server.port}/") == (ImageData(JPEG, "image/jpeg"),)
            said = "has a certificate that is not valid for it"
            assert await failure(images, f"https://{HOST}:{server.port}/") == said
        async with images_of(server, tls=True) as images:
            assert await failure(images, f"https://{HOME}:{server.port}/", HOME) == said


async def test_https_to_a_server_without_tls() -> None:
    """The failure is reported, and no data is sent in plaintext."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1000))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(answer, HOME, 0)
    port = listener.sockets[0].getsockname()[1]
    async with images_of(allowed_hosts=[f"*:{port}"], tls=True) as images:
        assert await failure(images, f"https://{HOST}:{port}/secret") == "cannot be reached"
    listener.close()
    assert b"secret" not in heard[0]
