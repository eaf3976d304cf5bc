"""The composition root: settings reach the parts, and signals end the process well."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio

from deltawire_server import app
from deltawire_server.app import FILES_SECONDS, SPARE_CONNECTIONS, Gateway, serve
from deltawire_server.errors import RegistryError
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.metrics import table
from deltawire_server.settings import (
    LogSettings,
    ProviderSettings,
    RegistrySettings,
    Settings,
    SettingsError,
    parse,
)
from deltawire_server.upstream.base import Timeouts
from deltawire_server.usage.log import UsageLimits, UsageLog
from deltawire_server.worker import Worker, WorkerLimits
from tests.support.gateway import (
    WAIT,
    Lines,
    Running,
    ask,
    failure_of,
    kinds,
    read,
    read_well,
    running,
    settings_of,
    text_of,
    until,
    until_refused,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from deltawire_server.completions.adaptive import AdaptiveDelay
    from deltawire_server.completions.records import Records
    from deltawire_server.images.load import Images
    from deltawire_server.memory import Ledger
    from tests.conftest import Certificates, StartGateway

CHUNKS = Chunks()


class Served:
    """`serve` as a task, and a channel to it."""

    def __init__(self, task: asyncio.Task[None], address: str, channel: aio.Channel) -> None:
        self.task = task
        self.address = address
        self.running = Running(None, channel)  # type: ignore[arg-type]

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send this process a signal."""
        os.kill(os.getpid(), number)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> Any:  # noqa: ANN401 (a context manager's function)
    """Runs `serve` in this process, which then takes this process's signals; logging stays the test's."""
    from contextlib import asynccontextmanager

    configured: list[tuple[str, str]] = []
    monkeypatch.setattr(app, "configure_logging", lambda level, form: configured.append((level, form)))

    @asynccontextmanager
    async def run(settings: Settings, reload: Callable[[], Settings] | None = None) -> AsyncIterator[Served]:
        task = asyncio.create_task(serve(settings, reload or (lambda: settings)))
        entry = await lines.find("serving")
        assert configured == [(settings.log.level, settings.log.format)]
        (address,) = entry["addresses"]
        async with asyncio.timeout(WAIT), aio.insecure_channel(address) as channel:
            yield Served(task, address, channel)
            await task

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(serving: Any, vllm: FakeVllm, tmp_path: Path, lines: Lines, number: int) -> None:  # noqa: ANN401
    """What is under way ends well, new calls are refused, then it is over."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    async with serving(settings_of(vllm.base_url, tmp_path)) as served:
        messages = aiter(served.running.stream())
        await anext(messages)
        served.signal(number)
        await lines.find("draining")
        await until_refused(served.running)
        assert not served.task.done()
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"
    await lines.find("stopped")


async def test_a_second_signal_hastens(serving: Any, vllm: FakeVllm, tmp_path: Path, lines: Lines) -> None:  # noqa: ANN401
    """A second signal ends the process without waiting for the delay, the grace period or calls."""
    vllm.play(Script.chunks([CHUNKS.role(), asyncio.Event()]))
    settings = settings_of(vllm.base_url, tmp_path, server={"drain_delay": 3600, "drain_grace": 3600})
    async with serving(settings) as served:
        stream = served.running.stream()
        await anext(aiter(stream))
        served.signal()
        await lines.find("draining")
        served.signal()
        events, failure = await read(stream)
        assert kinds(events)[-1] == "completed"
        assert failure is not None
        assert failure.reason == "DRAINING"
    await vllm.chats[0].closed_early.wait()


async def test_serving_says_what_it_is(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """Version, addresses, TLS and providers in one line, without any token."""
    async with start_gateway(provider={"api_token": "operators-secret"}) as gateway:
        entry = await lines.find("serving")
        assert entry["addresses"] == [gateway.address]
        assert entry["providers"] == {"vllm": [f"{vllm.base_url}/v1"]}
        assert entry["tls"] == "no"
        assert entry["version"]
    assert "secret" not in lines.getvalue()


async def test_a_database_that_cannot_be_used(vllm: FakeVllm, tmp_path: Path) -> None:
    """Nothing is listened on then, and nothing is left open."""
    (tmp_path / "file").write_text("not a folder")
    url = f"sqlite:///{tmp_path}/file/registry.db"
    settings = settings_of(vllm.base_url, tmp_path).model_copy(update={"registry": RegistrySettings(database_url=url)})
    gateway = Gateway(settings)
    with pytest.raises(RegistryError):
        await gateway.__aenter__()
    assert gateway.addresses == ()


async def test_settings_reach_the_parts(vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key of streams and providers arrives under its own name."""
    seen: list[WorkerLimits | None] = []
    logs: list[UsageLog | None] = []

    class Seen(Worker):
        def __init__(
            self,
            registry: Any,  # noqa: ANN401 (not used)
            providers: Any,  # noqa: ANN401 (not used)
            limits: WorkerLimits | None = None,
            images: Images | None = None,
            memory: Ledger | None = None,
            records: Records | None = None,
            adaptive: AdaptiveDelay | None = None,
            usage_log: UsageLog | None = None,
        ) -> None:
            seen.append(limits)
            logs.append(usage_log)
            super().__init__(registry, providers, limits, images, memory, records, adaptive, usage_log)

    monkeypatch.setattr(app, "Worker", Seen)
    settings = settings_of(
        vllm.base_url,
        tmp_path,
        server={"max_streams": 11, "max_duration": 12, "max_memory_bytes": 2**27, "max_completed_bytes": 1919},
        stream={
            "max_answer_bytes": 1818,
            "queue_bytes": 1313,
            "slow_caller_timeout": 14,
            "tail_timeout": 15,
            "max_tool_calls": 15,
            "max_tool_call_bytes": 1616,
            "max_event_bytes": 1717,
        },
        provider={
            "base_url": [vllm.base_url, "http://other:1/v1/"],
            "headers": {"x-team": "search"},
            "allowed_models": ["m*"],
            "allowed_extra_fields": ["return_*"],
            "max_tokens": 18,
            "first_event_timeout": 19,
            "silence_timeout": 20,
            "connect_timeout": 21,
            "refresh_interval": 22,
        },
        usage={"folder": str(tmp_path), "required": True, "retention_days": 23, "max_file_bytes": 2424},
    )
    gateway = Gateway(settings)
    (limits,), (usage_log,) = seen, logs
    assert usage_log is not None
    assert usage_log.limits == UsageLimits(2424, 23, required=True)
    assert limits is not None
    answer = limits.completion.answer
    assert (limits.max_streams, limits.completion.max_duration) == (11, 12)
    assert (limits.completion.queue_bytes, limits.completion.tail) == (1313, 15)
    assert (answer.max_calls, answer.max_call_bytes, answer.max_event_bytes) == (15, 1616, 1717)
    assert (answer.max_held_bytes, answer.max_completed_bytes) == (1818, 1919)
    assert gateway._worker.memory.limit == 2**27
    (provider,) = gateway._providers.all()
    assert (provider.id, provider.default_max_tokens, provider.timeouts) == ("vllm", 18, Timeouts(19, 20))
    assert (provider.base_urls, provider.refresh_interval) == ((f"{vllm.base_url}/v1", "http://other:1/v1"), 22)
    assert provider._allowed_models == ("m*",)  # type: ignore[attr-defined]
    assert provider._allowed_extra_fields == ("return_*",)  # type: ignore[attr-defined]
    assert provider._api._client.headers["x-team"] == "search"  # type: ignore[attr-defined]
    assert provider._api._client._transport._max_connections == 11 + SPARE_CONNECTIONS  # type: ignore[attr-defined]
    assert provider._api._timeout.connect == 21  # type: ignore[attr-defined]


async def test_tls_to_the_provider(start_gateway: StartGateway, certificates: Certificates) -> None:
    """By the CA file, not at all, or by the system's authorities, as the operator says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    async with FakeVllm(ssl_context=context) as vllm:
        for verify in (certificates.authority, False):
            async with start_gateway(base_url=vllm.base_url, provider={"tls_verify": verify}) as gateway:
                await read_well(gateway.stream())
        async with start_gateway(base_url=vllm.base_url) as gateway:
            failure = await failure_of(gateway.create())
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROVIDER_MISCONFIGURED")
    assert "certificate" in failure.message


async def test_serving_says_who_may_call(start_gateway: StartGateway, lines: Lines) -> None:
    """Every caller, which is no warning if only this machine can connect; or the number of keys and identities."""
    async with start_gateway():
        assert (await lines.find("serving"))["access"] == "every caller may do everything"
    async with start_gateway(access={"keys": "ops all secret-of-ops-itself; ci call sha256:" + "0" * 64}):
        await lines.find("serving", access="keys: 2, mTLS identities: 0")
    assert {entry["level"] for entry in lines.entries} <= {"info", "debug"}
    assert "secret" not in lines.getvalue()


async def test_warning_about_callers_on_other_machines(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, certificates: Certificates
) -> None:
    """The warning is logged unless the gateway has access lines or mutual TLS."""
    event = "callers on other machines may do everything"
    tls = {"tls_cert_file": certificates.server, "tls_key_file": certificates.server_key}
    mutual = tls | {"tls_client_ca_file": certificates.authority}
    warned: list[int] = []
    for server, access in ((tls, {}), (tls, {"keys": "ops all secret-of-ops-itself"}), (mutual, {})):
        before = len(lines.entries)
        settings = settings_of(vllm.base_url, tmp_path, server={"listen": "0.0.0.0:0", **server}, access=access)
        async with Gateway(settings):
            warned.append(sum(entry["event"] == event for entry in lines.entries[before:]))
    assert warned == [1, 0, 0]
    entry = await lines.find(event)
    assert (entry["level"], entry["addresses"]) == ("warning", ["0.0.0.0:0"])


async def test_a_keys_file_that_is_not_kept_safe(vllm: FakeVllm, tmp_path: Path, lines: Lines) -> None:
    """Is warned of, at the start and at every later load, and taken all the same."""
    keys = tmp_path / "keys"
    keys.write_text("ops all secret-of-ops-itself\n")
    keys.chmod(0o646)
    settings = settings_of(vllm.base_url, tmp_path, access={"keys_file": keys})
    async with Gateway(settings) as gateway:
        await gateway.reload(settings)
    warnings = [entry["problem"] for entry in lines.entries if entry["level"] == "warning"]
    assert [warning.partition(f" {keys}")[0] for warning in warnings] == [
        "users other than the owner can write",
        "all users of this machine can read the keys in",
    ] * 2
    assert "secret" not in lines.getvalue()


def settings_with(folder: Path, **providers: ProviderSettings) -> Settings:
    """Settings of a gateway before these providers."""
    return settings_of("http://127.0.0.1:1", folder).model_copy(update={"providers": providers})


def before(vllm: FakeVllm, **fields: Any) -> ProviderSettings:  # noqa: ANN401 (whatever the settings take)
    """A provider's settings."""
    return ProviderSettings.model_validate({"base_url": vllm.base_url, "tls_verify": False, **fields})


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    """A second vLLM look-alike, with a model of its own."""
    async with FakeVllm(models=("other",)) as other:
        yield other


@pytest.mark.parametrize("change", ["elsewhere", "same place", "removed"])
async def test_a_reload_drops_no_stream(
    vllm: FakeVllm, other: FakeVllm, tmp_path: Path, lines: Lines, change: str
) -> None:
    """A stream goes on to its good end while its provider is changed or removed; then the old connections are closed."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("one "), gate, CHUNKS.text("two"), CHUNKS.finish()]))
    after = {
        "elsewhere": {"vllm": before(other, api_token="new-secret")},
        "same place": {"vllm": before(vllm, silence_timeout=7)},
        "removed": {"second": before(other)},
    }[change]
    async with running(settings_with(tmp_path, vllm=before(vllm))) as gateway:
        old = gateway.gateway._providers.get("vllm")
        messages = aiter(gateway.stream())
        events = [await anext(messages)]
        await gateway.gateway.reload(settings_with(tmp_path, **after))
        if change == "removed":
            assert (await failure_of(gateway.create(ask(model="vllm/fake")))).reason == "MODEL_NOT_FOUND"
        model = "fake" if change == "same place" else "other"
        await read_well(gateway.stream(ask(model=model)))
        assert vllm.running == 1
        gate.set()
        events += [event async for event in messages]
        assert text_of(events) == "one two"
        assert kinds(events)[-1] == "completed"
        await until(lambda: old._api._client.is_closed)  # type: ignore[attr-defined]
        await until(lambda: vllm.connections == (1 if change == "same place" else 0))
    entry = await lines.find("settings reloaded")
    said = [entry[f"providers_{what}"] for what in ("added", "removed", "changed")]
    assert said == ([["second"], ["vllm"], []] if change == "removed" else [[], [], ["vllm"]])
    assert "secret" not in lines.getvalue()
    assert not [entry for entry in lines.entries if entry["event"] == "changed settings need a restart"]


async def test_a_reload_leaves_alone_what_did_not_change(vllm: FakeVllm, other: FakeVllm, tmp_path: Path) -> None:
    """The provider and its connection, whatever happens to others."""
    async with running(settings_with(tmp_path, a=before(vllm, api_token="same"))) as gateway:
        await read_well(gateway.stream())
        kept, connections = gateway.gateway._providers.get("a"), vllm.connections
        await gateway.gateway.reload(
            settings_with(tmp_path, a=before(vllm, api_token="same"), b=before(other, max_tokens=9))
        )
        assert gateway.gateway._providers.get("a") is kept
        await read_well(gateway.stream())
        assert vllm.connections == connections
        await read_well(gateway.stream(ask(model="other")))
        assert other.chats[0].body["max_tokens"] == 9


async def test_what_needs_a_restart_is_named(vllm: FakeVllm, tmp_path: Path, lines: Lines) -> None:
    """At every reload until then; it does not take effect."""
    settings = settings_with(tmp_path, vllm=before(vllm))
    changed = settings.model_copy(
        update={
            "server": settings.server.model_copy(update={"max_streams": 7, "drain_grace": 8.0}),
            "log": LogSettings(level="debug"),
        }
    )
    async with running(settings) as gateway:
        for _ in range(2):
            await gateway.gateway.reload(changed)
        assert gateway.gateway._settings == settings
    named = [entry for entry in lines.entries if entry["event"] == "changed settings need a restart"]
    assert [(entry["keys"], entry["level"]) for entry in named] == [
        (["server.max_streams", "server.drain_grace", "log.level"], "warning")
    ] * 2


CLOSED = {"keys": "ops all secret-of-ops-itself"}


@pytest.mark.parametrize("lost", [{}, {"keys": ""}, {"keys_file": ""}, {"revoke": "finish"}])
async def test_a_reload_does_not_open_a_closed_gateway(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, lost: dict[str, str]
) -> None:
    """Nothing of such settings takes effect, and the keys count on."""
    async with running(settings_of(vllm.base_url, tmp_path, access=CLOSED)) as gateway:
        with pytest.raises(SettingsError, match=r"access: .* every caller .* access\.open = true"):
            await gateway.gateway.reload(settings_of(vllm.base_url, tmp_path, access=lost, provider={"max_tokens": 7}))
        assert (await failure_of(gateway.create())).reason == "UNAUTHENTICATED"
        await gateway.create(metadata=(("authorization", "Bearer secret-of-ops-itself"),))
    assert "max_tokens" not in vllm.chats[0].body
    assert not [entry for entry in lines.entries if entry["event"] == "settings reloaded"]


async def test_a_reload_opens_a_gateway_that_is_to_be_open(vllm: FakeVllm, tmp_path: Path, lines: Lines) -> None:
    """By access.open; and an open one may stay so without it, and be closed."""
    without = settings_of(vllm.base_url, tmp_path)
    async with running(settings_of(vllm.base_url, tmp_path, access=CLOSED)) as gateway:
        await gateway.gateway.reload(settings_of(vllm.base_url, tmp_path, access={"open": True}))
        await gateway.create()
        await gateway.gateway.reload(without)
        await gateway.create()
        await gateway.gateway.reload(settings_of(vllm.base_url, tmp_path, access=CLOSED))
        assert (await failure_of(gateway.create())).reason == "UNAUTHENTICATED"
    said = [entry["access"] for entry in lines.entries if entry["event"] == "access loaded"]
    assert said == [*["every caller may do everything"] * 2, "keys: 1, mTLS identities: 0"]


@pytest.mark.parametrize("damage", ["emptied", "removed", "unreadable", "section removed"])
async def test_a_damaged_access_file_does_not_open_it(
    serving: Any,  # noqa: ANN401
    vllm: FakeVllm,
    tmp_path: Path,
    lines: Lines,
    damage: str,
) -> None:
    """Read as the process reads it, from the settings file, by SIGHUP."""
    keys, config = tmp_path / "keys", tmp_path / "deltawire.toml"
    keys.write_text("ops all secret-of-ops-itself\n")
    rest = f"""
        server = {{listen = "127.0.0.1:0", drain_delay = 0}}
        registry.database_url = "sqlite:///{tmp_path}/registry.db"
        providers.vllm = {{base_url = "{vllm.base_url}", tls_verify = false}}
    """
    config.write_text(f'access.keys_file = "{keys}"\n{rest}')

    def read_anew() -> Settings:
        return parse(["--config", str(config)], {}).settings

    async with serving(read_anew(), read_anew) as served:
        match damage:
            case "emptied":
                keys.write_text("# no line\n")
            case "removed":
                keys.unlink()
            case "unreadable":
                keys.unlink()
                keys.mkdir()
            case _:
                config.write_text(rest)
        served.signal(signal.SIGHUP)
        refused = await lines.find("settings refused")
        assert refused["level"] == "error"
        assert refused["problems"][0].startswith("access")
        assert (await failure_of(served.running.create())).reason == "UNAUTHENTICATED"
        served.signal()


class Files:
    """The files of a listener with mutual TLS, on two addresses, and its settings."""

    def __init__(self, folder: Path, base_url: str, certificates: Certificates) -> None:
        self.tls: dict[str, Any] = {
            "tls_cert_file": folder / "tls.crt",
            "tls_key_file": folder / "tls.key",
            "tls_client_ca_file": folder / "ca.crt",
        }
        self._authority = certificates.authority
        self._certificates = certificates
        self.tls["tls_client_ca_file"].write_bytes(certificates.authority.read_bytes())
        self.replace(certificates.server, certificates.server_key)
        listen = ["127.0.0.1:0", "127.0.0.1:0"]
        self.settings = settings_of(base_url, folder, server={"listen": listen, **self.tls})

    def replace(self, chain: Path, key: Path) -> None:
        """As cert-manager does: one file after the other."""
        self.tls["tls_cert_file"].write_bytes(chain.read_bytes())
        self.tls["tls_key_file"].write_bytes(key.read_bytes())

    async def served(self, address: str) -> bytes:
        """The certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=self._authority)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(self._certificates.client, self._certificates.client_key)
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            served = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            assert isinstance(served, bytes)
            return served
        finally:
            writer.close()


async def test_a_new_certificate_is_served_without_a_lost_stream(
    vllm: FakeVllm, tmp_path: Path, certificates: Certificates
) -> None:
    """Soon after its files have changed, on every address, with no signal; a stream that runs goes on."""
    vllm.play(Script.generated(tokens=200, tokens_per_second=100))
    files = Files(tmp_path, vllm.base_url, certificates)
    async with Gateway(files.settings) as gateway:
        credentials = grpc.ssl_channel_credentials(
            certificates.authority.read_bytes(), certificates.client_key.read_bytes(), certificates.client.read_bytes()
        )
        async with aio.secure_channel(gateway.addresses[0], credentials) as channel:
            reading = asyncio.create_task(read_well(Running(gateway, channel).stream()))
            before = [await files.served(address) for address in gateway.addresses]
            files.replace(*certificates.sign("renewed", "IP:127.0.0.1"))
            for address, old in zip(gateway.addresses, before, strict=True):
                async with asyncio.timeout(WAIT):
                    while await files.served(address) == old:  # noqa: ASYNC110 (nothing announces it)
                        await asyncio.sleep(0.05)
            assert not reading.done()
            assert kinds(await reading)[-1] == "completed"


async def test_a_certificate_that_cannot_be_used_is_refused(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, certificates: Certificates
) -> None:
    """The old one is served, and the log says what is wrong; a reload reads the files too."""
    files = Files(tmp_path, vllm.base_url, certificates)
    async with Gateway(files.settings) as gateway:
        old = await files.served(gateway.addresses[0])
        chain, key = certificates.sign("renewed", "IP:127.0.0.1")
        files.replace(chain, certificates.server_key)  # of another certificate
        refused = await lines.find("certificates refused: the old ones are still served")
        assert refused["level"] == "error"
        assert "is not that of" in str(refused["problem"])
        await gateway.reload(files.settings)
        assert await files.served(gateway.addresses[0]) == old
        files.replace(chain, key)
        await gateway.reload(files.settings)
        assert await files.served(gateway.addresses[0]) != old
        await lines.find("certificates loaded")
        await asyncio.sleep(3 * FILES_SECONDS)
        # By the reload, and not again because the files have changed.
        assert sum(entry["event"] == "certificates loaded" for entry in lines.entries) == 1


async def test_other_client_authorities_are_required_at_once(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, certificates: Certificates
) -> None:
    """New connections of clients with a certificate of the old authority fail."""
    files = Files(tmp_path, vllm.base_url, certificates)
    async with Gateway(files.settings) as gateway:
        await files.served(gateway.addresses[0])
        chain, _ = certificates.sign("authority", "DNS:other")
        files.tls["tls_client_ca_file"].write_bytes(chain.read_bytes())
        await gateway.reload(files.settings)
        await lines.find("certificates loaded")
        credentials = grpc.ssl_channel_credentials(
            certificates.authority.read_bytes(), certificates.client_key.read_bytes(), certificates.client.read_bytes()
        )
        async with aio.secure_channel(gateway.addresses[0], credentials) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await Running(gateway, channel).create()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_renewed_authorities_of_a_provider_are_used_without_a_signal(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, certificates: Certificates
) -> None:
    """The provider is replaced, as in a reload. Files that cannot be used are refused."""
    authority = tmp_path / "ca.pem"
    authority.write_bytes(certificates.authority.read_bytes())
    async with Gateway(settings_of(vllm.base_url, tmp_path, provider={"tls_verify": authority})):
        authority.write_text("no certificate")
        await lines.find("certificates refused: the old ones are still used")
        authority.write_bytes(certificates.authority.read_bytes() * 2)
        assert (await lines.find("settings reloaded"))["providers_changed"] == ["vllm"]


async def test_a_changed_authority_of_a_provider_is_read_again(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, certificates: Certificates
) -> None:
    """The provider counts as changed, though its settings are the same."""
    authority = tmp_path / "ca.pem"
    authority.write_bytes(certificates.authority.read_bytes())
    settings = settings_of(vllm.base_url, tmp_path, provider={"tls_verify": authority})
    async with Gateway(settings) as gateway:
        await gateway.reload(settings)
        authority.write_bytes(certificates.authority.read_bytes() * 2)
        await gateway.reload(settings)
    changed = [entry["providers_changed"] for entry in lines.entries if entry["event"] == "settings reloaded"]
    assert changed == [[], ["vllm"]]


async def test_a_reload_that_cannot_be_done_changes_nothing(vllm: FakeVllm, other: FakeVllm, tmp_path: Path) -> None:
    """Not even the part of it that could be; the key and the file are named."""
    (tmp_path / "ca.pem").write_text("no certificate")
    settings = settings_with(tmp_path, vllm=before(vllm))
    wrong = settings_with(tmp_path, other=before(other), wrong=before(vllm, tls_verify=tmp_path / "ca.pem"))
    async with running(settings) as gateway:
        with pytest.raises(SettingsError, match=r"providers\.wrong\.tls_verify: .*ca\.pem cannot be used"):
            await gateway.gateway.reload(wrong)
        assert gateway.gateway._providers.ids == ("vllm",)
        await read_well(gateway.stream())


async def test_hanging_up_reloads(
    serving: Any,  # noqa: ANN401
    vllm: FakeVllm,
    other: FakeVllm,
    tmp_path: Path,
    lines: Lines,
) -> None:
    """Refused settings and even a defect leave the old ones in effect and the next SIGHUP as good as the first."""
    outcomes: list[Settings | Exception] = [
        SettingsError(["server.listen: wrong", "log.level: wrong"]),
        RuntimeError("defect"),
        settings_with(tmp_path, vllm=before(other)),
    ]

    def reload() -> Settings:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async with serving(settings_with(tmp_path, vllm=before(vllm)), reload) as served:
        served.signal(signal.SIGHUP)
        refused = await lines.find("settings refused")
        assert refused["level"] == "error"
        assert refused["problems"] == ["server.listen: wrong", "log.level: wrong"]
        await read_well(served.running.stream())
        served.signal(signal.SIGHUP)
        assert "defect" in (await lines.find("settings not reloaded"))["exception"]
        await until(lambda: table.REGISTRY.get_sample_value("deltawire_settings_last_reload_successful") == 0)
        await read_well(served.running.stream())
        served.signal(signal.SIGHUP)
        await lines.find("settings reloaded")
        await until(lambda: table.REGISTRY.get_sample_value("deltawire_settings_last_reload_successful") == 1)
        await read_well(served.running.stream(ask(model="other")))
        served.signal()
    assert not outcomes
