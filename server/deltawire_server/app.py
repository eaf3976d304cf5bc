"""The composition root: creates a gateway from settings. The only module that imports every part."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog

from deltawire._version import __version__
from deltawire.v1 import chat_completion_pb2, chat_completion_pb2_grpc, model_registry_pb2, model_registry_pb2_grpc
from deltawire_server import signals
from deltawire_server.access import Access
from deltawire_server.completions.adaptive import AdaptiveDelay
from deltawire_server.completions.completion import CompletionLimits
from deltawire_server.completions.records import Records
from deltawire_server.completions.retention import RetentionLimits
from deltawire_server.images.load import Images
from deltawire_server.images.policy import Policy
from deltawire_server.lifecycle import Lifecycle, ListenError, State, plaintext_addresses
from deltawire_server.limits import LIMITS, Callers
from deltawire_server.limits import Limits as CallerLimits
from deltawire_server.memory import Allocator, Ledger, default_limit
from deltawire_server.metrics.listener import MetricsListener, serve_metrics
from deltawire_server.metrics.probes import Probes
from deltawire_server.metrics.process import ProcessMetrics
from deltawire_server.metrics.table import (
    CERTIFICATE_EXPIRY,
    CERTIFICATES_SUCCESSFUL,
    INFO,
    REGISTRY,
    RELOAD_SUCCESSFUL,
    RELOADS,
)
from deltawire_server.processes.passing import Passing
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
from deltawire_server.tracing.exporting import exporting
from deltawire_server.upstream.base import Timeouts
from deltawire_server.upstream.engine import EngineKind
from deltawire_server.upstream.providers import Providers
from deltawire_server.upstream.vllm import VllmProvider
from deltawire_server.usage.log import UsageLimits, UsageLog
from deltawire_server.worker import Worker, WorkerLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from grpc import aio

    from deltawire_server.processes.worker_process import WorkerProcess
    from deltawire_server.settings import ProviderSettings, Settings

SPARE_CONNECTIONS = 32
"""Connections of each provider's pool in addition to those of completions: for listings and health checks, which must not wait."""

REVOKED_SECONDS = 1.0
"""Time for completions of a revoked caller to send their last message; then the calls are ended."""

RETAINED_SHARE = 2
"""One caller may use this fraction of the places for completions with retention, by default."""

MEASURE_SECONDS = 1.0
"""Interval at which the metrics of the current state are set: much shorter than that of scrapers."""

PROCESS_SECONDS = 5.0
"""The same for those of the process, which take longer."""

FILES_SECONDS = 0.5
"""Interval at which the files of certificates are checked for changes."""

RELOADED = frozenset({"providers", "access", "limits"})
"""The sections of the settings that `Gateway.reload` applies; changes in the others require a restart."""

SERVICES = (
    chat_completion_pb2.DESCRIPTOR.services_by_name["ChatCompletion"].full_name,
    model_registry_pb2.DESCRIPTOR.services_by_name["ModelRegistry"].full_name,
)

_WOULD_OPEN = (
    "access: there are no access lines any more, so every caller could do everything: restore keys_file or keys, or set "
    "access.open = true (environment DELTAWIRE_ACCESS_OPEN)"
)
_USER_AGENT = f"deltawire/{__version__}"

_ENGINES = {"auto": None, "vllm": EngineKind.VLLM, "proxy": EngineKind.PROXY}

_log = get_logger(__name__)


class Gateway:
    """A gateway. Within `async with Gateway(settings) as gateway` it serves on `gateway.addresses`.

    Exit cancels active calls; call `drain` before to let them end.

    Args:
        settings: Valid settings.
        process: This process, if it is one of several workers of a gateway.

    Raises:
        SettingsError: From the constructor: a file that a provider's settings name cannot be used.
        ListenError: On entry: the gateway cannot listen on an address.
        RegistryError: On entry: the registry's database cannot be used.
    """

    def __init__(self, settings: Settings, process: WorkerProcess | None = None) -> None:
        self._settings = settings
        self._process = process
        self._stamps = _stamps(settings)  # before the files are read, so that no later change is missed
        self._authorities = _authorities(settings)
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics: MetricsListener | None = None
        # Before a scrape: their initial value is that of a failure.
        INFO.labels(__version__).set(1)
        for used in (RELOAD_SUCCESSFUL, *map(CERTIFICATES_SUCCESSFUL.labels, ("server", "providers"))):
            used.set(1)
        self._probes = Probes()
        self._connections = settings.server.max_streams + SPARE_CONNECTIONS
        self._providers = Providers(
            _provider(provider_id, provider, self._connections) for provider_id, provider in settings.providers.items()
        )
        self._registry = ModelRegistry(_store(settings), self._providers)
        self._images = Images(_image_policy(settings), user_agent=_USER_AGENT)
        workers = process.count if process else 1
        memory = Ledger((settings.server.max_memory_bytes or default_limit()) // workers)
        self._allocator = Allocator()
        memory.trim = self._allocator.trim
        self._adaptive = AdaptiveDelay(settings.server.max_adaptive_delay)
        mark = process.mark if process else secrets.token_hex(4)
        records = Records(mark=mark, seat=process.seat if process else "")
        self._usage_log = _usage_log(settings, mark)
        table = process.limits_table() if process else None
        self._callers = Callers(_caller_limits(settings, workers), table, process.number if process else 0)
        limits = _worker_limits(settings, workers)
        self._worker = Worker(
            self._registry, self._providers, limits, self._images, memory, records, self._adaptive, self._usage_log
        )
        self._access = Access(settings.access.principals, settings.access.trust)
        chat = ChatCompletionServicer(
            self._worker,
            max_completed_bytes=settings.server.max_completed_bytes,
            max_retention=settings.retention.max_retention,
            slow_caller_timeout=settings.stream.slow_caller_timeout,
            content_limits=ContentLimits(settings.images.max_images, settings.images.max_image_bytes),
            worker_number=process.number if process else 0,
        )
        models = ModelRegistryServicer(
            self._registry, self._providers, slow_watcher_seconds=settings.stream.slow_caller_timeout
        )
        self._calls = CallInterceptor(
            self._worker.end_all,
            models.end_watches,
            self._access,
            admission=self._worker.admission,
            callers=self._callers,
            memory=memory,
            # Requests that are being received do not count against the memory limit, so there must be room for them beside it.
            reception=Reception(
                min(settings.server.max_receiving, max(1, memory.limit // (2 * settings.server.max_receive_bytes))),
                settings.server.receive_timeout,
            ),
        )
        listener = settings.server
        interceptors: list[aio.ServerInterceptor] = [self._calls]
        self._passing: Passing | None = None
        if process is not None:
            listener = listener.model_copy(
                update={
                    "listen": tuple(process.addresses),
                    "health_listen": process.health or "off",
                    "workers": process.count,
                }
            )
            self._passing = Passing(
                process,
                self._calls,
                memory,
                max_receive_bytes=listener.max_receive_bytes,
                slow_caller_timeout=settings.stream.slow_caller_timeout,
            )
            chat_completion_pb2_grpc.add_ChatCompletionServicer_to_server(chat, self._passing.server)
            interceptors.append(self._passing)
        self._lifecycle = lifecycle = Lifecycle(listener, interceptors, self._calls)
        # Without a reference to the gateway: in a cycle, it would be freed by the garbage collector, in whichever thread that
        # runs. gRPC's server then corrupts memory, as a process with several gateways, one after the other, has shown.
        self._probes.is_ready = lambda: lifecycle.state is State.SERVING
        self._lifecycle.add_service(
            lambda server: chat_completion_pb2_grpc.add_ChatCompletionServicer_to_server(chat, server)
        )
        self._lifecycle.add_service(
            lambda server: model_registry_pb2_grpc.add_ModelRegistryServicer_to_server(models, server)
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses that it listens on."""
        return self._lifecycle.addresses

    @property
    def health_address(self) -> str:
        """The address of the health listener; empty for none."""
        return self._lifecycle.health_address

    @property
    def metrics_address(self) -> str:
        """The address of the metrics, which the parent of workers serves; empty for none."""
        if self._process is not None:
            return self._process.metrics
        return "" if self._metrics is None else self._metrics.address

    async def __aenter__(self) -> Self:
        try:
            # A worker listens when it can serve, because the kernel assigns connections to it from then on.
            if self._process is None:
                self._serve_metrics()
                self._lifecycle.listen()  # early, so that a gateway that cannot serve creates no database
            await self._registry.open()
            self._registry.start_refreshing()
            if self._process is not None and self._passing is not None:
                await self._passing.start()
                if not await self._process.ready():
                    raise ListenError("the parent process has ended")
            await self._lifecycle.start(SERVICES)
            self._run(self._allocator.trim_for_ever(), "return free memory")
            self._run(self._adaptive.adapt_for_ever(), "adapt the delay of deltas")
            self._run(self._beat_for_ever(), "beat")
            self._run(self._measure_for_ever(), "measure")
            self._run(self._measure_process_for_ever(), "measure the process")
            self._run(self._follow_files(), "follow certificate files")
            if self._usage_log is not None:
                self._run(self._usage_log.keep(), "keep usage records")
        except BaseException:
            await self._close()
            raise
        if self._process is None or self._process.announces:
            self._announce()
        return self

    def _serve_metrics(self) -> None:
        metrics = self._settings.metrics
        try:
            self._metrics = serve_metrics(metrics.address, REGISTRY, self._probes, is_default=metrics.is_default)
        except OSError as error:
            raise ListenError(str(error)) from error

    async def _beat_for_ever(self) -> None:
        """Show that the event loop runs. Apart from the measurements, whose defects must not look like a process that hangs."""
        while True:
            self._probes.beat()
            if self._process is not None:
                self._process.report(beat=True)
            await asyncio.sleep(MEASURE_SECONDS)

    async def _measure_for_ever(self) -> None:
        """Set the metrics of the current state, and the load that calls report, once a second."""
        while True:
            try:
                self._measure()
            except Exception:  # noqa: BLE001 (a defect of one must not end the others)
                _log.exception("the metrics of the current state are not set")
            await asyncio.sleep(MEASURE_SECONDS)

    def _measure(self) -> None:
        if self._lifecycle.certificates is not None:
            CERTIFICATE_EXPIRY.set(self._lifecycle.certificates.expiry)
        self._worker.measure()
        self._registry.measure()
        self._providers.measure()
        if self._settings.server.load_reports:
            self._calls.load.measure(self._worker.utilization)

    async def _measure_process_for_ever(self) -> None:
        """In a thread: counting file descriptors takes milliseconds if there are thousands."""
        process = ProcessMetrics()
        while True:
            await asyncio.to_thread(process.measure)
            await asyncio.sleep(PROCESS_SECONDS)

    def _announce(self) -> None:
        """Log what is served, and warnings about it."""
        server = self._settings.server
        _log.info(
            "serving",
            version=__version__,
            addresses=list(self.addresses),
            tls="mutual" if server.tls_client_ca_file else "yes" if server.tls else "no",
            access=self._access.summary,
            workers=1 if self._process is None else self._process.count,
            file_descriptors=self._lifecycle.descriptors,
            max_connections=self._lifecycle.max_connections,
            health=self.health_address or "off",
            metrics=self.metrics_address or "off",
            providers={provider.id: list(provider.base_urls) for provider in self._providers.all()},
        )
        exposed = plaintext_addresses(server)
        if exposed:
            _log.warning("serving without TLS to other machines", addresses=list(exposed))
        self._log_access_warnings(self._settings)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def reload(self, settings: Settings) -> None:
        """Apply new settings while serving: every change in the sections of `RELOADED`, or nothing if this fails.

        Providers with unchanged settings keep their connections. The others are created again, and active calls of the old
        ones run to their end. The log names changed keys that require a restart, which keep their old values. The files of the
        server's certificates are read again too; if they cannot be used, the log says why, and the old ones are still served.

        Args:
            settings: Valid settings.

        Raises:
            SettingsError: A file that a provider's settings name cannot be used, or the settings remove all access lines without
                setting `access.open`. Nothing has changed.
        """
        if not (self._access.open or settings.access.principals or settings.access.open):
            raise SettingsError([_WOULD_OPEN])
        before, after = self._settings.providers, settings.providers
        stamps = _stamps(settings.model_copy(update={"server": self._settings.server}))  # whose files stay the same
        authorities = _authorities(settings)
        changed = {
            provider_id
            for provider_id in before.keys() & after.keys()
            if before[provider_id] != after[provider_id]
            or self._authorities.get(provider_id) != authorities.get(provider_id)
        }
        present = {provider.id: provider for provider in self._providers.all() if provider.id not in changed}
        providers = [
            present.get(provider_id) or _provider(provider_id, provider, self._connections)
            for provider_id, provider in after.items()
        ]
        # Nothing fails from here on: each section of RELOADED takes effect.
        self._providers.replace(providers)
        self._registry.providers_changed(changed | (before.keys() ^ after.keys()))
        self._load_access(settings)
        self._load_limits(settings)
        self._load_certificates()
        CERTIFICATES_SUCCESSFUL.labels("providers").set(1)
        waiting = _changed_keys(self._settings, settings)
        self._stamps, self._authorities = stamps, authorities
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

    def _load_certificates(self) -> None:
        """Read the server's certificates again, for new connections."""
        certificates = self._lifecycle.certificates
        if certificates is None:
            return
        try:
            if certificates.reload():
                _log.info("certificates loaded")
            CERTIFICATES_SUCCESSFUL.labels("server").set(1)
        except OSError as error:
            CERTIFICATES_SUCCESSFUL.labels("server").set(0)
            _log.error("certificates refused: the old ones are still served", problem=str(error))

    async def _follow_files(self) -> None:
        """Apply changes of the files of certificates and authorities, as they are renewed without a signal."""
        while True:
            await asyncio.sleep(FILES_SECONDS)
            # In a thread only if there are files, which may be on a slow disk.
            stamps = await asyncio.to_thread(_stamps, self._settings) if _certificate_files(self._settings) else []
            if stamps == self._stamps:
                continue
            self._stamps = stamps
            self._load_certificates()
            if _authorities(self._settings) == self._authorities:
                # They may have been refused before, and be the old ones again.
                CERTIFICATES_SUCCESSFUL.labels("providers").set(1)
            else:
                try:
                    await self.reload(self._settings)
                except SettingsError as error:
                    CERTIFICATES_SUCCESSFUL.labels("providers").set(0)
                    _log.error("certificates refused: the old ones are still used", problem=str(error))

    def _load_access(self, settings: Settings) -> None:
        """Authorize calls by the new settings from now on, and end active calls of revoked callers if the settings say so."""
        before, after = self._settings.access, settings.access
        if (after.principals, after.trust) != (before.principals, before.trust):
            self._access.replace(after.principals, after.trust)
            self._registry.interrupt_watches()
            if settings.access.revoke == "end":
                self._run(self._end_revoked(), "end revoked calls")
        _log.info("access loaded", access=self._access.summary)
        self._log_access_warnings(settings)

    def _load_limits(self, settings: Settings) -> None:
        """Apply the limits to calls from now on."""
        workers = self._process.count if self._process else 1
        # The number of places does not change.
        served = settings.model_copy(update={"server": self._settings.server})
        self._callers.defaults = _caller_limits(served, workers)
        self._worker.admission.queue_size = settings.limits.queue_size
        self._worker.admission.queue_timeout = settings.limits.queue_timeout

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task until it ends or the gateway is closed."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_revoked(self) -> None:
        def admits(owner: str, assertion: str) -> bool:
            # All methods of completions require the same permission.
            return self._access.admits(owner, STREAM_CHAT, assertion)

        await self._worker.end_revoked(admits)
        await asyncio.sleep(REVOKED_SECONDS)
        # Now end the remaining calls: their requests are still being received or validated, or they run no completion.
        await self._calls.end_revoked()
        # Some of them may have started a completion in the meantime.
        await self._worker.end_revoked(admits)

    async def drain(self) -> None:
        """Report NOT_SERVING, accept calls for `server.drain_delay` seconds, then let active calls end."""
        await self._lifecycle.stop()

    async def stop(self) -> None:
        """Cancel active calls; also possible while draining."""
        await self._lifecycle.stop(at_once=True)

    def _log_access_warnings(self, settings: Settings) -> None:
        for warning in settings.access.warnings:
            _log.warning("the access keys file has unsafe permissions", problem=warning)
        server = self._settings.server
        exposed = [address for address in server.listen if not is_local(address)]
        # With mutual TLS, the certificate authority decides who can connect.
        if self._access.open and exposed and server.tls_client_ca_file is None:
            _log.warning("callers on other machines may do everything", addresses=exposed)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._lifecycle.stop(at_once=True)
        if self._passing is not None:
            await self._passing.close()
        await self._worker.close()
        if self._usage_log is not None:
            await asyncio.to_thread(self._usage_log.close)
        await self._registry.close()
        await self._providers.close()
        await self._images.close()
        self._callers.close()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)


async def serve(settings: Settings, reload: Callable[[], Settings], process: WorkerProcess | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or the end of a worker's parent, then drain; a second signal cancels active calls.

    SIGHUP reads the settings again and applies them. If they are invalid, the log says why, and the current settings stay.

    Args:
        settings: The initial settings.
        reload: Reads the settings again; raises `SettingsError` if they are invalid.
        process: This process, if it is one of several workers of a gateway.

    Raises:
        SettingsError: A file that a provider's settings name cannot be used.
        ListenError: The gateway cannot listen on an address.
        RegistryError: The registry's database cannot be used.
    """
    configure_logging(settings.log.level, settings.log.format)
    if process is not None:
        structlog.contextvars.bind_contextvars(worker=process.number)  # in the records of all tasks
    drain_requested = asyncio.Event()
    stop_requested = asyncio.Event()
    reload_requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals.STOP:
        loop.add_signal_handler(number, lambda: (stop_requested if drain_requested.is_set() else drain_requested).set())
    loop.add_signal_handler(signals.RELOAD, reload_requested.set)
    if set(signals.STOP) & set(signals.take_recorded()):  # an early SIGHUP needs no reload: the settings are new
        _log.info("stopped before serving")
        return
    tracing = exporting(os.environ, __version__, None if process is None else process.number)
    async with tracing, Gateway(settings, process) as gateway:
        if process is not None:
            process.serving(parent_ended=drain_requested.set)
        reloading = asyncio.create_task(_reload_on(reload_requested, gateway, reload))
        await drain_requested.wait()
        reloading.cancel()
        draining = asyncio.create_task(gateway.drain())
        stopping = asyncio.create_task(stop_requested.wait())
        await asyncio.wait([draining, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await gateway.stop()
        await asyncio.wait([draining])
    _log.info("stopped")


async def _reload_on(requested: asyncio.Event, gateway: Gateway, reload: Callable[[], Settings]) -> None:
    """Reload each time the event is set, one reload at a time, until cancelled."""
    while True:
        await requested.wait()
        requested.clear()
        outcome = "refused"
        try:
            await gateway.reload(reload())
            outcome = "ok"
        except SettingsError as error:
            _log.error("settings refused", problems=list(error.problems))
        except Exception:  # noqa: BLE001 (a defect must not prevent later reloads)
            _log.exception("settings not reloaded")
        RELOADS.labels(outcome).inc()
        RELOAD_SUCCESSFUL.set(outcome == "ok")


def _authorities(settings: Settings) -> dict[str, bytes]:
    """The files of authorities in the settings of providers, by provider; without those that cannot be read."""
    contents: dict[str, bytes] = {}
    for provider_id, provider in settings.providers.items():
        if isinstance(provider.tls_verify, Path):
            with contextlib.suppress(OSError):
                contents[provider_id] = provider.tls_verify.read_bytes()
    return contents


def _stamps(settings: Settings) -> list[tuple[int, int, int] | None]:
    """What changes when a file of a certificate or of authorities is replaced."""
    return [_stamp(path) for path in _certificate_files(settings)]


def _certificate_files(settings: Settings) -> list[Path]:
    server = settings.server
    files = (server.tls_cert_file, server.tls_key_file, server.tls_client_ca_file)
    verified = (provider.tls_verify for provider in settings.providers.values())
    return [file for file in (*files, *verified) if isinstance(file, Path)]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _changed_keys(before: Settings, after: Settings) -> list[str]:
    """The changed keys, as `section.key`, of sections that are not reloaded."""
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


def _usage_log(settings: Settings, mark: str) -> UsageLog | None:
    usage = settings.usage
    if usage.folder is None:
        return None
    return UsageLog(usage.folder, mark, UsageLimits(usage.max_file_bytes, usage.retention_days, usage.required))


def _tls(provider_id: str, verify: bool | Path) -> ssl.SSLContext | bool:
    if not isinstance(verify, Path):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        problem = f"{verify} cannot be used ({error}): give a PEM file with the certificates of certificate authorities"
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


def _caller_limits(settings: Settings, workers: int) -> CallerLimits:
    """The limits of a caller without limits of its own."""
    limits = {name: getattr(settings.limits, name) for name in LIMITS}
    if limits["retained_streams"] is None:
        limits["retained_streams"] = max(1, settings.server.max_streams * workers // RETAINED_SHARE)
    return CallerLimits(**limits)


def _worker_limits(settings: Settings, workers: int) -> WorkerLimits:
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
            max_bytes=settings.retention.max_bytes // workers,
            max_completed_bytes=settings.server.max_completed_bytes,
        ),
        queue_size=settings.limits.queue_size,
        queue_timeout=settings.limits.queue_timeout,
    )
