"""The composition root: settings in, a running gateway out. The only module that knows every part."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deltawire._version import __version__
from deltawire.v1 import chat_completion_pb2, chat_completion_pb2_grpc, model_registry_pb2, model_registry_pb2_grpc
from deltawire_server import signals
from deltawire_server.access import Access
from deltawire_server.completions.completion import CompletionLimits
from deltawire_server.completions.retention import RetentionLimits
from deltawire_server.images.load import Images
from deltawire_server.images.policy import Policy
from deltawire_server.lifecycle import Lifecycle, plaintext_addresses
from deltawire_server.memory import Allocator, Ledger, default_limit
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store, StoreLimits
from deltawire_server.rpc.chat_completion import ChatCompletionServicer
from deltawire_server.rpc.interceptors import STREAM_CHAT, CallInterceptor
from deltawire_server.rpc.model_registry import ModelRegistryServicer
from deltawire_server.rpc.reception import Reception
from deltawire_server.rpc.validate_content import ContentLimits
from deltawire_server.sansio.reader import Limits
from deltawire_server.secret import Secret
from deltawire_server.settings import SettingsError, is_local
from deltawire_server.telemetry import configure_logging, get_logger
from deltawire_server.upstream.base import Timeouts
from deltawire_server.upstream.engine import EngineKind
from deltawire_server.upstream.providers import Providers
from deltawire_server.upstream.vllm import VllmProvider
from deltawire_server.worker import Worker, WorkerLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from deltawire_server.settings import ProviderSettings, Settings

SPARE_CONNECTIONS = 32
"""Of each provider's pool, above the completions that are admitted: for listings and health, which must not wait."""

REVOKED_SECONDS = 1.0
"""What completions whose caller's access is revoked get to send their last message; then the calls themselves are ended."""

RELOADED = frozenset({"providers", "access"})
"""The sections of the settings that `Gateway.reload` takes over; what changes in the others waits for a restart."""

SERVICES = (
    chat_completion_pb2.DESCRIPTOR.services_by_name["ChatCompletion"].full_name,
    model_registry_pb2.DESCRIPTOR.services_by_name["ModelRegistry"].full_name,
)

_CERTIFICATES = ("server.tls_cert_file", "server.tls_key_file", "server.tls_client_ca_file")
_WOULD_OPEN = (
    "access: no line says who may call any more, which would let everybody do everything: restore keys_file or keys, or set "
    "access.open = true (environment DELTAWIRE_ACCESS_OPEN)"
)
_USER_AGENT = f"deltawire/{__version__}"

_ENGINES = {"auto": None, "vllm": EngineKind.VLLM, "proxy": EngineKind.PROXY}

_log = get_logger(__name__)


class Gateway:
    """A gateway, from its settings: `async with Gateway(settings) as gateway`, then it serves on `gateway.addresses`.

    Leaving cancels what is under way; `drain` first to let it end.

    Args:
        settings: Checked already.

    Raises:
        SettingsError: When made: what a provider's settings name cannot be used.
        ListenError: On entering: an address cannot be listened on.
        RegistryError: On entering: the registry's database cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = _digests(settings)
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = settings.server.max_streams + SPARE_CONNECTIONS
        self._providers = Providers(
            _provider(provider_id, provider, self._connections) for provider_id, provider in settings.providers.items()
        )
        self._registry = ModelRegistry(_store(settings), self._providers)
        self._images = Images(_image_policy(settings), user_agent=_USER_AGENT)
        memory = Ledger(settings.server.max_memory_bytes or default_limit())
        self._allocator = Allocator()
        memory.trim = self._allocator.trim
        self._worker = Worker(self._registry, self._providers, _worker_limits(settings), self._images, memory)
        self._access = Access(settings.access.principals)
        chat = ChatCompletionServicer(
            self._worker,
            max_completed_bytes=settings.server.max_completed_bytes,
            max_retention=settings.retention.max_retention,
            slow_caller_timeout=settings.stream.slow_caller_timeout,
            content_limits=ContentLimits(settings.images.max_images, settings.images.max_image_bytes),
        )
        models = ModelRegistryServicer(
            self._registry, self._providers, slow_watcher_seconds=settings.stream.slow_caller_timeout
        )
        self._calls = CallInterceptor(
            self._worker.end_all,
            models.end_watches,
            self._access,
            admission=self._worker.admission,
            memory=memory,
            # What is being received is not in the account of memory, so that there must be room for it beside the limit.
            reception=Reception(
                min(settings.server.max_receiving, max(1, memory.limit // (2 * settings.server.max_receive_bytes))),
                settings.server.receive_timeout,
            ),
        )
        self._lifecycle = Lifecycle(settings.server, [self._calls], self._calls)
        self._lifecycle.add_service(
            lambda server: chat_completion_pb2_grpc.add_ChatCompletionServicer_to_server(chat, server)
        )
        self._lifecycle.add_service(
            lambda server: model_registry_pb2_grpc.add_ModelRegistryServicer_to_server(models, server)
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """What it listens on."""
        return self._lifecycle.addresses

    async def __aenter__(self) -> Self:
        try:
            await self._registry.open()
            self._registry.start_refreshing()
            await self._lifecycle.start(SERVICES)
            self._run(self._allocator.trim_for_ever(), "return free memory")
        except BaseException:
            await self._close()
            raise
        server = self._settings.server
        _log.info(
            "serving",
            version=__version__,
            addresses=list(self.addresses),
            tls="mutual" if server.tls_client_ca_file else "yes" if server.tls else "no",
            access=self._access.summary,
            file_descriptors=self._lifecycle.descriptors,
            max_connections=self._lifecycle.max_connections,
            providers={provider.id: list(provider.base_urls) for provider in self._providers.all()},
        )
        exposed = plaintext_addresses(server)
        if exposed:
            _log.warning("serving without TLS to other machines", addresses=list(exposed))
        self._warn_of_access(self._settings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def reload(self, settings: Settings) -> None:
        """Take over new settings while serving: all that can be, or nothing if any of it cannot be used.

        Providers whose settings are the same stay as they are, with their connections. Others are made anew, and calls
        under way at the old ones go on to their end. Keys that need a restart are named in the log, and stay as they were; so
        are those of certificates, which are read at the start only, if their files have changed.

        Args:
            settings: Checked already.

        Raises:
            SettingsError: What a provider's settings name cannot be used, or settings that would open a gateway to everybody
                do not set `access.open`; all is as it was.
        """
        if not (self._access.open or settings.access.principals or settings.access.open):
            raise SettingsError([_WOULD_OPEN])
        before, after = self._settings.providers, settings.providers
        files = _digests(settings)
        changed = {
            provider_id
            for provider_id in before.keys() & after.keys()
            if before[provider_id] != after[provider_id]
            or self._files.get(f"providers.{provider_id}.tls_verify")
            != files.get(f"providers.{provider_id}.tls_verify")
        }
        present = {provider.id: provider for provider in self._providers.all() if provider.id not in changed}
        providers = [
            present.get(provider_id) or _provider(provider_id, provider, self._connections)
            for provider_id, provider in after.items()
        ]
        # All that can be refused was: from here on each section of RELOADED takes effect.
        self._providers.replace(providers)
        self._registry.providers_changed(changed | (before.keys() ^ after.keys()))
        self._load_access(settings)
        waiting = _changed_keys(self._settings, settings)
        waiting += [key for key in _CERTIFICATES if key not in waiting and files.get(key) != self._files.get(key)]
        self._files = files | {key: self._files[key] for key in _CERTIFICATES if key in self._files}
        self._settings = self._settings.model_copy(update={section: getattr(settings, section) for section in RELOADED})
        _log.info(
            "settings reloaded",
            sections=sorted(RELOADED),
            providers_added=sorted(after.keys() - before.keys()),
            providers_removed=sorted(before.keys() - after.keys()),
            providers_changed=sorted(changed),
        )
        if waiting:
            _log.warning("changed settings need a restart", keys=waiting)

    def _load_access(self, settings: Settings) -> None:
        """Check calls from now on by what freshly read settings say of who may call, and end those that they say to end."""
        if settings.access.principals != self._settings.access.principals:
            self._access.replace(settings.access.principals)
            self._registry.interrupt_watches()
            if settings.access.revoke == "end":
                self._run(self._end_revoked(), "end revoked calls")
        _log.info("access loaded", access=self._access.summary)
        self._warn_of_access(settings)

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task until it ends, at the latest with the gateway."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_revoked(self) -> None:
        def admits(owner: str) -> bool:
            # All methods of completions need the same permission.
            return self._access.admits(owner, STREAM_CHAT)

        await self._worker.end_revoked(admits)
        await asyncio.sleep(REVOKED_SECONDS)
        # Then the calls that are left: their request is still received or validated, or they are no completion.
        await self._calls.end_revoked()
        # Some of them may have begun a completion meanwhile.
        await self._worker.end_revoked(admits)

    async def drain(self) -> None:
        """Turn NOT_SERVING, take calls until balancers have noticed, then let those under way end."""
        await self._lifecycle.stop()

    async def stop(self) -> None:
        """Cancel what is under way; also while draining."""
        await self._lifecycle.stop(at_once=True)

    def _warn_of_access(self, settings: Settings) -> None:
        for warning in settings.access.warnings:
            _log.warning("the access keys file is not kept safe", problem=warning)
        server = self._settings.server
        exposed = [address for address in server.listen if not is_local(address)]
        # With mutual TLS the authority says who gets there.
        if self._access.open and exposed and server.tls_client_ca_file is None:
            _log.warning("everybody on other machines may do everything", addresses=exposed)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._lifecycle.stop(at_once=True)
        await self._worker.close()
        await self._registry.close()
        await self._providers.close()
        await self._images.close()


async def serve(settings: Settings, reload: Callable[[], Settings]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cancels what is still under way.

    On SIGHUP settings are read anew and taken over. Wrong ones are refused in the log, and those in effect stay.

    Args:
        settings: To begin with.
        reload: Reads them anew; raises `SettingsError` if they are wrong.

    Raises:
        SettingsError: What a provider's settings name cannot be used.
        ListenError: An address cannot be listened on.
        RegistryError: The registry's database cannot be used.
    """
    configure_logging(settings.log.level, settings.log.format)
    asked = asyncio.Event()
    insisted = asyncio.Event()
    hung_up = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals.STOP:
        loop.add_signal_handler(number, lambda: (insisted if asked.is_set() else asked).set())
    loop.add_signal_handler(signals.RELOAD, hung_up.set)
    if set(signals.STOP) & set(signals.taken()):  # the settings are new, so an early SIGHUP asks for nothing
        _log.info("stopped before serving")
        return
    async with Gateway(settings) as gateway:
        reloading = asyncio.create_task(_reload_on(hung_up, gateway, reload))
        await asked.wait()
        reloading.cancel()
        draining = asyncio.create_task(gateway.drain())
        insisting = asyncio.create_task(insisted.wait())
        await asyncio.wait([draining, insisting], return_when=asyncio.FIRST_COMPLETED)
        insisting.cancel()
        await gateway.stop()
        await asyncio.wait([draining])
    _log.info("stopped")


async def _reload_on(hung_up: asyncio.Event, gateway: Gateway, reload: Callable[[], Settings]) -> None:
    """Reload each time the event is set, one after the other, until cancelled."""
    while True:
        await hung_up.wait()
        hung_up.clear()
        try:
            await gateway.reload(reload())
        except SettingsError as error:
            _log.error("settings refused", problems=list(error.problems))
        except Exception:  # noqa: BLE001 (a defect must not be the last reload)
            _log.exception("settings not reloaded")


def _digests(settings: Settings) -> dict[str, bytes]:
    """The digests of the certificate files that settings name, by their keys; a file that cannot be read has none."""
    paths: dict[str, object] = {key: getattr(settings.server, key.partition(".")[2]) for key in _CERTIFICATES}
    paths |= {
        f"providers.{provider_id}.tls_verify": each.tls_verify for provider_id, each in settings.providers.items()
    }
    digests: dict[str, bytes] = {}
    for key, path in paths.items():
        if isinstance(path, Path):
            with contextlib.suppress(OSError):
                digests[key] = hashlib.sha256(path.read_bytes()).digest()
    return digests


def _changed_keys(before: Settings, after: Settings) -> list[str]:
    """The keys, as `section.key`, that differ in sections that are not reloaded."""
    return [
        f"{section}.{key}"
        for section in type(before).model_fields
        if section not in RELOADED
        for key in type(getattr(before, section)).model_fields
        if getattr(getattr(before, section), key) != getattr(getattr(after, section), key)
    ]


def _provider(provider_id: str, settings: ProviderSettings, connections: int) -> VllmProvider:
    token = settings.api_token
    return VllmProvider(
        provider_id,
        *settings.base_url,
        api_token=token.get_secret_value() if token is not None else None,
        headers={name: Secret(value.get_secret_value()) for name, value in settings.headers.items()},
        allowed_models=settings.allowed_models,
        allowed_extra_fields=settings.allowed_extra_fields,
        accepts_caller_tokens=settings.accept_caller_tokens,
        tls=_tls(provider_id, settings.tls_verify),
        default_max_tokens=settings.max_tokens,
        max_connections=connections,
        connect_timeout=settings.connect_timeout,
        timeouts=Timeouts(settings.first_event_timeout, settings.silence_timeout),
        refresh_interval=settings.refresh_interval,
        user_agent=_USER_AGENT,
        engine=_ENGINES[settings.engine],
    )


def _store(settings: Settings) -> Store:
    registry = settings.registry
    limits = StoreLimits(registry.max_models, registry.max_aliases, registry.max_bytes)
    return Store(registry.database_url, limits=limits)


def _tls(provider_id: str, verify: bool | Path) -> ssl.SSLContext | bool:
    if not isinstance(verify, Path):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        problem = f"{verify} cannot be used ({error}): give a PEM file with the certificates of authorities"
        raise SettingsError([f"providers.{provider_id}.tls_verify: {problem}"]) from error


def _image_policy(settings: Settings) -> Policy:
    images = settings.images
    return Policy(
        urls=images.urls,
        allowed_hosts=images.allowed_hosts,
        schemes=images.schemes,
        max_image_bytes=images.max_image_bytes,
        max_fetched_bytes=images.max_fetched_bytes,
        timeout=images.timeout,
        max_redirects=images.max_redirects,
    )


def _worker_limits(settings: Settings) -> WorkerLimits:
    stream = settings.stream
    return WorkerLimits(
        max_streams=settings.server.max_streams,
        completion=CompletionLimits(
            max_duration=settings.server.max_duration,
            queue_bytes=stream.queue_bytes,
            tail=stream.tail_timeout,
            answer=Limits(
                max_event_bytes=stream.max_event_bytes,
                max_calls=stream.max_tool_calls,
                max_call_bytes=stream.max_tool_call_bytes,
                max_held_bytes=stream.max_answer_bytes,
                max_completed_bytes=settings.server.max_completed_bytes,
            ),
        ),
        retention=RetentionLimits(
            max_stream_bytes=settings.retention.max_stream_bytes,
            max_bytes=settings.retention.max_bytes,
            max_completed_bytes=settings.server.max_completed_bytes,
        ),
    )
