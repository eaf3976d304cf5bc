"""Web addresses: each trick by which one program is made to read another host than the next."""

# ruff: noqa: RUF001 -- look-alikes are what is tested

from __future__ import annotations

import urllib.parse

import pytest
import yarl
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.upstream.web_address import MAX_URL_LENGTH, UrlError, WebAddress, web_address

REFUSED = {
    "empty": "",
    "relative": "/image.png",
    "no scheme": "allowed.example/image.png",
    "of the same scheme": "//allowed.example/image.png",
    "one slash": "https:/allowed.example",
    "no slash": "https:allowed.example",
    "three slashes": "https:///allowed.example",
    "backslashes for slashes": "https:\\\\allowed.example",
    "file": "file:///etc/passwd",
    "ftp": "ftp://allowed.example/a.png",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict": "dict://127.0.0.1:11211/stats",
    "javascript": "javascript:alert(1)",
    "url in a url": "url:https://allowed.example/",
    "a scheme that begins alike": "httpsx://allowed.example/",
    "a look-alike scheme": "ｈｔｔｐ://allowed.example/",
    "userinfo": "http://allowed.example@evil.example/",
    "userinfo with a password": "http://allowed.example:80@evil.example/",
    "empty userinfo": "http://@evil.example/",
    "two userinfos": "http://a@allowed.example@evil.example/",
    "backslash before userinfo": "http://evil.example\\@allowed.example/",
    "backslash for a slash": "http://evil.example\\.allowed.example/",
    "tab": "http://evil.exa\tmple/",
    "new line": "http://allowed.example/\r\nHost: evil.example",
    "new line in front": "\nhttp://allowed.example/",
    "space in front": " http://allowed.example/",
    "space behind": "http://allowed.example/ ",
    "no-break space": "http://allowed.example\u00a0.evil.example/",
    "zero": "http://allowed.example\0.evil.example/",
    "zero-width space": "http://allowed\u200b.example/",
    "right-to-left override": "http://\u202eelpmaxe.live/",
    "soft hyphen": "http://local\u00adhost/",
    "escaped dot in the host": "http://127%2e0%2e0%2e1/",
    "escaped at": "http://allowed.example%40evil.example/",
    "escaped slash": "http://evil.example%2f.allowed.example/",
    "full-width slash": "http://evil.example／.allowed.example/",
    "full-width at": "http://allowed.example＠evil.example/",
    "a letter that becomes a/c": "http://evil.c℀.allowed.example/",
    "no host": "http://:80/",
    "empty port": "http://allowed.example:/",
    "port 0": "http://allowed.example:0/",
    "port beyond": "http://allowed.example:65536/",
    "port that wraps around": "http://allowed.example:65616/",
    "port in letters": "http://allowed.example:http/",
    "signed port": "http://allowed.example:+80/",
    "full-width port": "http://allowed.example:８０/",
    "two ports": "http://allowed.example:80:6379/",
    "port of another host": "http://allowed.example:80#@evil.example:80/:0".replace("#", ":"),
    "two dots at the end": "http://allowed.example../",
    "an empty label": "http://allowed..example/",
    "a dot alone": "http://./",
    "a dot in front": "http://.allowed.example/",
    "a hyphen in front": "http://-allowed.example/",
    "a long label": f"http://{'a' * 64}.example/",
    "a long name": f"http://{'a.' * 126}aa/",
    "a long name in another script": f"http://{'ä.' * 5000}example/",
    "a label that the DNS cannot have": "http://ä--‿.example/",
    "a comma": "http://allowed.example,evil.example/",
    "a semicolon": "http://allowed.example;evil.example/",
    "IPv4: nothing but 0": "http://0/",
    "IPv4: short": "http://127.1/",
    "IPv4: one number": "http://2130706433/",
    "IPv4: hexadecimal": "http://0x7f000001/",
    "IPv4: hexadecimal with dots": "http://0x7f.0x0.0x0.0x1/",
    "IPv4: an empty hexadecimal": "http://127.0.0.0x/",
    "IPv4: octal": "http://0177.0.0.1/",
    "IPv4: octal with more zeros": "http://00000177.0.0.01/",
    "IPv4: beyond a byte": "http://127.0.0.257/",
    "IPv4: beyond 32 bits": "http://4294967297/",
    "IPv4: five numbers": "http://127.0.0.0.1/",
    "IPv4: enclosed digits, short": "http://①②⑦.①/",
    "IPv4: a name before it": "http://allowed.example.1/",
    "IPv6: without brackets": "http://::1/",
    "IPv6: zone": "http://[fe80::1%eth0]/",
    "IPv6: escaped zone": "http://[fe80::1%25eth0]/",
    "IPv6: IPv4 in brackets": "http://[127.0.0.1]/",
    "IPv6: a name in brackets": "http://[allowed.example]/",
    "IPv6: nothing in brackets": "http://[]/",
    "IPv6: of the future": "http://[v1.a]/",
    "IPv6: something behind": "http://[2600::1].evil.example/",
    "too long": "http://allowed.example/" + "a" * MAX_URL_LENGTH,
    "too long when escaped": "http://allowed.example/" + "ä" * (MAX_URL_LENGTH // 2),
}

READ = {
    "as usual": ("https://allowed.example/a.png?b=c&d=%20", "https://allowed.example/a.png?b=c&d=%20"),
    "upper case": ("HTTPS://ALLOWED.Example/A.PNG", "https://allowed.example/A.PNG"),
    "dot at the end": ("https://allowed.example./a", "https://allowed.example/a"),
    "the scheme's own port": ("http://allowed.example:80/", "http://allowed.example/"),
    "zeros before the port": ("http://allowed.example:00080/", "http://allowed.example/"),
    "another port": ("http://allowed.example:8443", "http://allowed.example:8443/"),
    "a query without a path": ("http://allowed.example?a", "http://allowed.example/?a"),
    "userinfo after #": ("http://allowed.example#@evil.example/", "http://allowed.example/"),
    "userinfo after ?": ("http://allowed.example?@evil.example/", "http://allowed.example/?@evil.example/"),
    "userinfo after /": ("http://allowed.example/@evil.example/", "http://allowed.example/@evil.example/"),
    "a fragment of two": ("https://allowed.example/a#b#c", "https://allowed.example/a"),
    "a path in another script": ("https://allowed.example/ä?ö", "https://allowed.example/%C3%A4?%C3%B6"),
    "escapes stay as they are": ("https://allowed.example/%2e%2E/%41", "https://allowed.example/%2e%2E/%41"),
    "dots in the path": ("https://allowed.example/../a", "https://allowed.example/../a"),
    "a host in another script": ("https://bücher.example/", "https://xn--bcher-kva.example/"),
    "full-width letters": ("https://ａｌｌｏｗｅｄ.example/", "https://allowed.example/"),
    "enclosed letters": ("https://ⓐⓛⓛⓞⓦⓔⓓ.example/", "https://allowed.example/"),
    "an ideographic full stop": ("https://allowed。example｡/", "https://allowed.example/"),
    "an upper-case K of Kelvin": ("https://\u212aelvin.example/", "https://kelvin.example/"),
    "an underscore": ("https://a_b.example/", "https://a_b.example/"),
    "hyphens": ("https://r3---sn-a.example/", "https://r3---sn-a.example/"),
    "IPv4": ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/"),
    "IPv4 in enclosed digits": ("http://①②⑦.⓪.⓪.①/", "http://127.0.0.1/"),
    "IPv4 with ideographic full stops": ("http://127。0。0。1/", "http://127.0.0.1/"),
    "IPv4 with a dot at the end": ("http://127.0.0.1./", "http://127.0.0.1/"),
    "IPv6": ("http://[2600:0::1]:80/", "http://[2600::1]/"),
    "IPv6: unspecified": ("http://[::]/", "http://[::]/"),
    "IPv6: hides IPv4": ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
}


@pytest.mark.parametrize("trick", REFUSED)
def test_refused(trick: str) -> None:
    """What programs do not agree on, in a short sentence."""
    with pytest.raises(UrlError, match=r"^must .{10,90}$"):
        web_address(REFUSED[trick])


@pytest.mark.parametrize("trick", READ)
def test_one_form(trick: str) -> None:
    """What they agree on, or what all resolvers make of it, in the form that is judged and used; it is stable."""
    text, form = READ[trick]
    assert str(web_address(text)) == form
    assert str(web_address(form)) == form


def test_parts() -> None:
    """An address's host has no brackets, its target path and query."""
    address = web_address("HTTP://[2600::1]:8000/a?b#c")
    assert (address.scheme, address.host, address.port, address.target) == ("http", "2600::1", 8000, "/a?b")
    assert str(address.ip) == "2600::1"
    assert not address.on_usual_port
    assert web_address("https://a.example").on_usual_port
    assert web_address("https://a.example").ip is None


_AWKWARD = st.text(st.sampled_from("aA1.0x:/\\@#?%[]-_ \t\n｡①ä=&;,~'\"<>{}|^`"), max_size=30)


@settings(max_examples=500)
@given(_AWKWARD)
def test_others_read_the_form_alike(rest: str) -> None:
    """Whatever is let through, the other parsers in Python find the same host and port in its form."""
    try:
        address = web_address(f"http://{rest}")
    except UrlError:
        return
    split = urllib.parse.urlsplit(str(address))
    assert (split.scheme, split.hostname, split.port or 80) == (address.scheme, address.host, address.port)
    url = yarl.URL(str(address))
    assert (url.scheme, url.raw_host, url.port, url.user) == (address.scheme, address.host, address.port, None)
    assert isinstance(web_address(str(address)), WebAddress)
    assert str(address).isascii()
