"""The members of vLLM 0.32's chat answers, in the same order.

    role · text … text · finish · usage · [DONE]        one SSE event each
    role · call · arguments … arguments · finish · …    a tool call, as the hermes parser sends it

`Chunks` builds single chunks as dicts, for a stream that a test defines; `Generation` generates the whole answer to a request,
streamed or not.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FINGERPRINT = "vllm-0.32.0-4769c46b"
DONE = b"data: [DONE]\n\n"

# Split like a tokenizer: a word keeps the space before it.
WORDS = re.findall(
    r" ?\w+|\. |[^\w ]",
    "The sea keeps every letter that the rivers send, reads them by moonlight, and answers with the tide. ",
)


def event(chunk: dict[str, Any]) -> bytes:
    """Encode a chunk as one SSE event in vLLM's style: chunks compact, errors with spaces."""
    text = json.dumps(chunk).encode() if "error" in chunk else msgspec.json.encode(chunk)
    return b"data: %b\n\n" % text


def error_body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Build the body of vLLM's errors, which is also that of an error event within a stream.

    Args:
        status: The HTTP status; it is repeated as `code`.
        message: One sentence.
        kind: `BadRequestError`, `NotFoundError`, `InternalServerError` ….
        param: The request's member at fault.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def prompt_tokens(request: dict[str, Any]) -> int:
    """Count the tokens of a chat request or a text: a fixed number for the template, and one for each word."""
    return 8 + sum(len(str(message).split()) for message in request.get("messages") or (request.get("prompt"),))


@dataclass(frozen=True, slots=True)
class Chunks:
    """Builds the chunks of one streamed answer, each a dict for `Script.chunks`.

    Attributes:
        id: The completion's id.
        model: The name that the answer gives.
        created: Seconds since 1970.
    """

    id: str = "chatcmpl-0000000000000001"
    model: str = "fake"
    created: int = 1_795_329_025

    def role(self, index: int = 0) -> dict[str, Any]:
        """Begin a choice; vLLM sends this when the first token is ready."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._chunk([choice]) | {"prompt_token_ids": None, "prompt_text": None}

    def text(self, text: str, index: int = 0) -> dict[str, Any]:
        """A piece of the answer's text."""
        return self.delta({"content": text}, index)

    def reasoning(self, text: str, index: int = 0) -> dict[str, Any]:
        """A piece of the model's reasoning."""
        return self.delta({"reasoning": text}, index)

    def call(
        self, name: str, call_id: str = "chatcmpl-tool-0000000000000001", position: int = 0, index: int = 0
    ) -> dict[str, Any]:
        """Begin the tool call at `position` of choice `index`, without arguments."""
        entry = {"id": call_id, "type": "function", "index": position, "function": {"name": name}}
        return self.delta({"content": None, "tool_calls": [entry]}, index)

    def arguments(self, fragment: str, position: int = 0, index: int = 0) -> dict[str, Any]:
        """A piece of a call's arguments: JSON text, split anywhere."""
        entry = {"index": position, "function": {"arguments": fragment}}
        return self.delta({"content": None, "tool_calls": [entry]}, index)

    def delta(self, delta: dict[str, Any], index: int = 0) -> dict[str, Any]:
        """Any delta of choice `index`."""
        return self._chunk(
            [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}]
        )

    def finish(
        self, reason: str = "stop", index: int = 0, delta: dict[str, Any] | None = None, *, usage_follows: bool = False
    ) -> dict[str, Any]:
        """End a choice, with its last delta if there is one; this chunk has the fingerprint unless usage follows."""
        choice = {
            "index": index,
            "delta": delta or {},
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": None,
            "token_ids": None,
        }
        return self._chunk([choice]) | ({} if usage_follows else {"system_fingerprint": FINGERPRINT})

    def usage(self, prompt: int, completion: int) -> dict[str, Any]:
        """The usage of the whole answer: the chunk without choices that `include_usage` requests."""
        counts = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
        return self._chunk([]) | {"usage": counts, "system_fingerprint": FINGERPRINT}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return head | {"choices": choices}


@dataclass(slots=True)
class Generation:
    """A generated answer to one chat request. The same request gets the same answer, except for the ids.

    It honours `max_tokens` (or `max_completion_tokens`), `ignore_eos`, `n`, `stream_options` and `tool_choice`; nothing
    else of the request changes it.

    Attributes:
        request: The decoded body.
        number: What the ids are made of when the caller brings none.
        model: The name that the answer gives.
        tokens: Length of an answer that no limit cuts; of a call, the pieces of its arguments.
        tool_call: Answer with a call even if the request does not insist on one.
        request_id: The caller's `X-Request-Id`; empty for none.
    """

    request: dict[str, Any]
    number: int
    model: str
    tokens: int
    tool_call: bool = False
    request_id: str = ""
    choices: int = field(init=False)
    prompt_tokens: int = field(init=False)
    completion_tokens: int = field(init=False)
    _name: str = field(init=False)
    _pieces: Sequence[str] = field(init=False)
    _finish: str = field(init=False)

    def __post_init__(self) -> None:
        """Choose name, pieces, length and finish reason."""
        request = self.request
        self.choices = request.get("n") or 1
        self.prompt_tokens = prompt_tokens(request)
        tool_choice = request.get("tool_choice")
        named = isinstance(tool_choice, dict)
        pieces: Sequence[str]
        if named or tool_choice == "required":
            self._name, pieces = _call(request.get("tools") or [], tool_choice)
            whole = 1 + len(pieces)
        elif self.tool_call:
            self._name, pieces = _long_call(request.get("tools") or [], self.tokens)
            whole = 1 + len(pieces)
        else:
            self._name, pieces = "", WORDS
            whole = self.tokens
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        if limit is not None and (whole > limit or (request.get("ignore_eos") and not self._name)):
            # A call is not lengthened, because its arguments are complete.
            self.completion_tokens, self._finish = limit, "length"
        else:
            self.completion_tokens = whole
            self._finish = "tool_calls" if self._name and not named else "stop"
        self._pieces = pieces

    @property
    def id(self) -> str:
        """`chatcmpl-` and the request's id, or a number."""
        return f"chatcmpl-{self.request_id or self.request.get('request_id') or f'{self.number:016x}'}"

    def steps(self) -> Iterator[list[bytes]]:
        """Stream the answer: the SSE events of each step of the engine, for all choices in turn.

        The first step opens the choices and has their first token; the last one ends the stream.
        """
        chunks = Chunks(self.id, self.model, int(time.time()))
        options = self.request.get("stream_options") or {}
        usage = bool(options.get("include_usage"))
        counted = usage and bool(options.get("continuous_usage_stats"))
        prompt, last = self.prompt_tokens, self.completion_tokens
        order = range(self.choices)

        def numbered(chunk: dict[str, Any], count: int) -> bytes:
            return _numbered(msgspec.json.encode(chunk), prompt, count) if counted else event(chunk)

        opening = [numbered(chunks.role(index), 0) for index in order]
        # The parts that do not change from token to token are encoded once per stream.
        plain = [[msgspec.json.encode(delta) for delta in self._deltas(chunks, index)] for index in order]
        ready = [[b"data: %b\n\n" % chunk for chunk in of_choice] for of_choice in plain]
        streamed = last - 1 if self._finish == "length" else last
        cycle = len(self._pieces)
        offset = 1 if self._name else 0
        for count in range(1, streamed + 1):
            # The first token of a call is its name; its pieces are not repeated.
            which = count - 1 if offset else (count - 1) % cycle
            if counted:
                step = [_numbered(of_choice[which], prompt, count) for of_choice in plain]
            else:
                step = [of_choice[which] for of_choice in ready]
            yield opening + step if opening else step
            opening = []

        closing = opening
        for index in order:
            delta = None
            if self._finish == "length":
                # The token at the limit is in the chunk with the finish reason.
                which = last - 1 if offset else (last - 1) % cycle
                delta = json.loads(plain[index][which])["choices"][0]["delta"]
            closing.append(numbered(chunks.finish(self._finish, index, delta, usage_follows=usage), last))
        if usage:
            closing.append(event(chunks.usage(prompt, last * self.choices)))
        yield [*closing, DONE]

    def body(self) -> bytes:
        """The answer as one JSON body."""
        completion = self.completion_tokens * self.choices
        body = {
            "id": self.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "message": self._message(index),
                    "logprobs": None,
                    "finish_reason": self._finish,
                    "stop_reason": None,
                    "token_ids": None,
                    "routed_experts": None,
                }
                for index in range(self.choices)
            ],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "total_tokens": self.prompt_tokens + completion,
                "completion_tokens": completion,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
        }
        body |= dict.fromkeys(
            (
                "prompt_logprobs",
                "prompt_token_ids",
                "prompt_text",
                "kv_transfer_params",
                "ec_transfer_params",
                "metrics",
            )
        )
        return msgspec.json.encode(body)

    def _deltas(self, chunks: Chunks, index: int) -> Iterator[dict[str, Any]]:
        if not self._name:
            yield from (chunks.text(word, index) for word in self._pieces)
            return
        yield chunks.call(self._name, self._call_id(index), 0, index)
        yield from (chunks.arguments(piece, 0, index) for piece in self._pieces)

    def _message(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None}
        message |= dict.fromkeys(("refusal", "annotations", "audio", "function_call"))
        if self._name:
            arguments = "".join(self._pieces[: self.completion_tokens - 1])
            function = {"name": self._name, "arguments": arguments}
            message["tool_calls"] = [{"id": self._call_id(index), "type": "function", "function": function}]
        else:
            cycle = len(WORDS)
            message["content"] = "".join(WORDS[count % cycle] for count in range(self.completion_tokens))
        return message | {"reasoning": None}

    def _call_id(self, index: int) -> str:
        return f"chatcmpl-tool-{self.number:012x}{index:04x}"


def _numbered(chunk: bytes, prompt: int, completion: int) -> bytes:
    """Encode a chunk as an SSE event with the choice's usage so far, for `continuous_usage_stats`."""
    # The order of members differs from vLLM's in the first and last chunk of a choice, which does not matter in JSON.
    return (
        b'data: %b,"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,"completion_tokens_details":null}}\n\n'
        % (chunk[:-1], prompt, prompt + completion, completion)
    )


def _call(tools: list[dict[str, Any]], tool_choice: object) -> tuple[str, list[str]]:
    """Build a call of the named tool, or of the first one, with the minimal arguments for its schema."""
    name = tool_choice["function"]["name"] if isinstance(tool_choice, dict) else tools[0]["function"]["name"]
    schema = next((tool["function"].get("parameters") or {} for tool in tools if tool["function"]["name"] == name), {})
    arguments = json.dumps(_sample({**schema, "type": "object"}), ensure_ascii=False)
    return name, re.findall(r" ?\w+|[^\w]", arguments)


def _long_call(tools: list[dict[str, Any]], tokens: int) -> tuple[str, list[str]]:
    """Build a call of the first tool whose argument `text` has exactly `tokens` pieces (at least two)."""
    name = tools[0]["function"]["name"] if tools else "write"
    return name, ['{"text": "', *(WORDS[count % len(WORDS)] for count in range(tokens - 2)), '"}']


def _sample(schema: dict[str, Any]) -> object:
    """A minimal value for the usual kinds of JSON schema."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "string")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: _sample(properties.get(name, {})) for name in schema.get("required") or properties}
    samples: dict[str, object] = {
        "integer": schema.get("minimum", 1),
        "number": schema.get("minimum", 1.5),
        "boolean": True,
        "array": [],
        "null": None,
    }
    return samples.get(kind, "Oslo")
