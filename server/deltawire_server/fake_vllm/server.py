"""The fake server: vLLM's endpoints with recorded or generated answers."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from deltawire_server.fake_vllm.connection import Connection, Metronome, Request
from deltawire_server.fake_vllm.described import openapi
from deltawire_server.fake_vllm.player import Player
from deltawire_server.fake_vllm.script import Script
from deltawire_server.fake_vllm.wire import DONE, Generation, prompt_tokens

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection, Iterable, Sequence

CHAT = "/v1/chat/completions"
MAX_MODEL_LEN = 4096

# More connections than any benchmark opens at once; the kernel applies its own limit.
BACKLOG = 4096


class FakeVllm:
    """A fake vLLM server on its own port.

        async with FakeVllm(api_key="k") as vllm:
            vllm.play(Script.recording("tool-one.sse"), Script.error(503, "busy"))
            …                                   # the code under test talks to vllm.base_url
            chat = await vllm.received()        # the request that it sent
            await chat.closed_early.wait()      # it has disconnected

    One intended difference: vLLM continues to generate while a client does not read; this server waits for the client, so
    that endless streams need no memory.

    Args:
        default: The answer if none is queued; by default a short generated text.
        models: The served names, at least one. As in vLLM, answers have the first name, whichever name the request has.
        adapters: LoRA adapters of the first name, which is their `parent`. Answers have the adapter of the request.
        api_key: The API key required on `/v1/*` only; `None` for none.
        host: The address to listen on.
        port: The port; 0 for a free one.
        ssl_context: The context for TLS; `None` for plain HTTP.
        without_fields: Fields of a chat request, or of a tool's function, to leave out of the OpenAPI document, as in older
            versions. Like those, the server ignores them in requests.
        without_endpoints: Paths that do not exist, such as `/tokenize`.

    Attributes:
        requests: All received requests, in order.
        running: Number of chat requests in progress, the metric `vllm:num_requests_running`.
        version: The reported version; it and `without_fields` may be changed at run time, as by an upgrade.
        without_fields: See above.
        healthy: If `False`, `/health` answers 503, as after a crash of the engine.
    """

    def __init__(
        self,
        default: Script | None = None,
        *,
        models: Sequence[str] = ("fake",),
        adapters: Sequence[str] = (),
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        without_fields: Collection[str] = (),
        without_endpoints: Collection[str] = (),
    ) -> None:
        self.requests: list[Request] = []
        self.running = 0
        self.healthy = True
        self.version = "0.32.0"
        self.without_fields = without_fields
        self._default = default or Script.generated()
        self._queued: deque[Script] = deque()
        self._models = tuple(models)
        self._adapters = dict.fromkeys(adapters)
        self._api_key = api_key
        self._host = host
        self._port = port
        self._ssl = ssl_context
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._metronome = Metronome()
        self._numbers = itertools.count(1)
        self._arrived = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()
        routes: dict[tuple[str, str], Callable[[Any], Script | None]] = {
            ("POST", CHAT): self._refusal,
            ("GET", "/v1/models"): self._list_models,
            ("GET", "/health"): lambda _: Script.answer(b"", status=200 if self.healthy else 503),
            ("GET", "/version"): lambda _: Script.answer({"version": self.version}),
            ("GET", "/openapi.json"): lambda _: Script.answer(openapi(self.version, self.without_fields)),
            ("POST", "/tokenize"): self._tokenize,
            ("GET", "/is_sleeping"): lambda _: Script.answer({"is_sleeping": not self._awake.is_set()}),
            ("GET", "/metrics"): self._metrics,
        }
        self._routes = {key: route for key, route in routes.items() if key[1] not in without_endpoints}

    async def __aenter__(self) -> Self:
        """Start to listen; `base_url` is valid from here on."""
        await self.start_listening()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and abort every connection."""
        await self.crash()

    @property
    def port(self) -> int:
        """The port; 0 before the first `start_listening` if a free one is requested."""
        return self._port

    @property
    def base_url(self) -> str:
        """`http://host:port`, without `/v1`."""
        return f"{'https' if self._ssl else 'http'}://{self._host}:{self._port}"

    @property
    def chats(self) -> list[Request]:
        """The chat requests among `requests`."""
        return [request for request in self.requests if request.path == CHAT]

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    def play(self, *scripts: Script) -> None:
        """Queue the answers to the next chat requests, one for each; a request that is rejected as invalid takes none."""
        self._queued.extend(scripts)

    async def received(self, count: int = 1) -> Request:
        """Wait until `count` chat requests were received since the start, and return the last of them."""
        while len(chats := self.chats) < count:
            self._arrived.clear()
            await self._arrived.wait()
        return chats[count - 1]

    def load_adapter(self, name: str) -> None:
        """Serve one more LoRA adapter, as after `/v1/load_lora_adapter`. No effect if it is served already."""
        self._adapters[name] = None

    def unload_adapter(self, name: str) -> None:
        """Remove a LoRA adapter: chat requests for it get 404 from now on.

        Raises:
            KeyError: There is no adapter of this name.
        """
        del self._adapters[name]

    def sleep(self) -> None:
        """Put the engine to sleep: chat requests get headers only, while `/health` stays 200."""
        self._awake.clear()

    def wake(self) -> None:
        """Wake the engine: requests received meanwhile are answered."""
        self._awake.set()

    async def start_listening(self) -> None:
        """Start to listen; after a stop, on the same port.

        Raises:
            OSError: The address cannot be used.
        """
        make = partial(Connection, self._answer, self._connections, self._metronome)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(make, self._host, self._port, backlog=BACKLOG, ssl=self._ssl)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop_listening(self) -> None:
        """Refuse new connections; open ones stay."""
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    async def crash(self) -> None:
        """Stop listening and abort every connection, as `kill -9` does; `start_listening` restarts it."""
        await self.stop_listening()
        for connection in tuple(self._connections):
            connection.drop()
        while self._connections or self.running:  # noqa: ASYNC110 - it takes one or two iterations of the loop
            await asyncio.sleep(0)

    async def _answer(self, request: Request, connection: Connection) -> None:
        self.requests.append(request)
        if request.path == CHAT:
            self._arrived.set()
        document = self._document(request)
        if document is None:
            await self._chat(request, connection)
        else:
            await Player(connection, document).play([[piece] for piece in document.pieces or ()])

    def _document(self, request: Request) -> Script | None:
        """The answer to a request; `None` for a valid chat request, whose answer is played."""
        guarded = self._api_key is not None and request.path.startswith("/v1")
        if guarded and request.headers.get("authorization") != f"Bearer {self._api_key}":
            return Script.answer({"error": "Unauthorized"}, status=401)
        route = self._routes.get((request.method, request.path))
        if route is not None:
            return route(request.body)
        if any(path == request.path for _, path in self._routes):
            return Script.answer({"detail": "Method Not Allowed"}, status=405)
        return Script.answer({"detail": "Not Found"}, status=404)

    async def _chat(self, request: Request, connection: Connection) -> None:
        script = self._queued.popleft() if self._queued else self._default
        self.running += 1
        try:
            script, steps = self._prepare(script, request)
            if not self._awake.is_set():
                steps = itertools.chain([[self._awake]], steps)
            await Player(connection, script).play(steps)
        finally:
            self.running -= 1

    def _prepare(self, script: Script, request: Request) -> tuple[Script, Iterable[Sequence[bytes | asyncio.Event]]]:
        """The steps to play: the script's pieces, or a generated answer."""
        if script.pieces is not None:
            return script, [[piece] for piece in script.trimmed()]
        generation = Generation(
            request.body,
            next(self._numbers),
            self._answering(request.body.get("model")),
            script.tokens,
            script.tool_call,
            request.headers.get("x-request-id", ""),
        )
        if request.body.get("stream"):
            steps = generation.steps()
            if script.end == "no_done":
                return script, ([piece for piece in step if piece is not DONE] for step in steps)
            return script, steps
        whole = script.headers_delay + script.first_delay + script.chunk_delay * generation.completion_tokens
        script = dataclasses.replace(
            script,
            chunked=False,
            content_type="application/json",
            headers_delay=whole,
            first_delay=0.0,
            chunk_delay=0.0,
        )
        return script, [[generation.body()]]

    def _refusal(self, body: Any) -> Script | None:  # noqa: ANN401 - it is any JSON
        """The error for a request that vLLM rejects; `None` for a valid one."""
        if not isinstance(body, dict):
            message = "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body', 'msg': 'JSON decode error'}"
            return Script.error(400, message, "Bad Request", "body")
        if "messages" not in body:
            message = "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required'}"
            return Script.error(400, message, "Bad Request", "body.messages")
        if (unknown := self._unknown_model(body)) is not None:
            return unknown
        tool_choice = body.get("tool_choice")
        names = [tool["function"]["name"] for tool in body.get("tools") or ()]
        if tool_choice == "required" and not names:
            message = "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)"
            return Script.error(400, message, "BadRequestError", "tool_choice")
        if isinstance(tool_choice, dict) and tool_choice["function"]["name"] not in names:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools` (parameter=tool_choice)"
            return Script.error(400, message, "BadRequestError", "tool_choice")
        return None

    def _unknown_model(self, body: dict[str, Any]) -> Script | None:
        model = body.get("model")
        if model is None or model in (*self._models, *self._adapters):
            return None
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join(self._models)}."
        return Script.error(404, message, "NotFoundError", "model")

    def _answering(self, model: str | None) -> str:
        """The model name in the answer to a request for this name."""
        return model if model in self._adapters else self._models[0]

    def _list_models(self, _: object) -> Script:
        now = int(time.time())
        cards = [self._card(name, now, number) for number, name in enumerate((*self._models, *self._adapters))]
        return Script.answer({"object": "list", "data": cards})

    def _card(self, name: str, now: int, number: int) -> dict[str, Any]:
        permission = {
            "id": f"modelperm-{number:016x}",
            "object": "model_permission",
            "created": now,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        adapter = name in self._adapters
        return {
            "id": name,
            "object": "model",
            "created": now,
            "owned_by": "vllm",
            "root": f"/adapters/{name}" if adapter else f"/models/{self._models[0]}",
            "parent": self._models[0] if adapter else None,
            "max_model_len": None if adapter else MAX_MODEL_LEN,  # vLLM reports it for base models only
            "permission": [permission],
        }

    def _tokenize(self, body: Any) -> Script:  # noqa: ANN401 - it is any JSON
        if not isinstance(body, dict) or not ({"messages", "prompt"} & body.keys()):
            message = "2 validation errors:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required'}"
            return Script.error(400, message, "Bad Request", "body.messages")
        if (unknown := self._unknown_model(body)) is not None:
            return unknown
        count = prompt_tokens(body)
        counted = {"count": count, "max_model_len": MAX_MODEL_LEN, "tokens": list(range(count)), "token_strs": None}
        return Script.answer(counted)

    def _metrics(self, _: object) -> Script:
        name = self._models[0]
        labels = f'engine="0",model_name="{name}"'
        awake = int(self._awake.is_set())
        text = (
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{{{labels}}} {self.running}.0\n"
            "# HELP vllm:num_requests_waiting Number of requests waiting to be processed.\n"
            "# TYPE vllm:num_requests_waiting gauge\n"
            f"vllm:num_requests_waiting{{{labels}}} 0.0\n"
            "# HELP vllm:engine_sleep_state Engine sleep state; awake = 0 means engine is sleeping.\n"
            "# TYPE vllm:engine_sleep_state gauge\n"
            f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}} {awake}.0\n'
        )
        content_type = "text/plain; version=1.0.0; charset=utf-8"
        return Script.answer(text.encode(), content_type=content_type)
