"""The next request and the next calls, until the model answers: the conversation of `run_tools` without any I/O.

    ASK ── answer ──▶ receive ── calls that can all be run ──▶ RUN ── results ──▶ finish ──▶ ASK
                        │ ├───── calls of which one cannot: all get an error ────────────────▶ ASK
                        │ └───── no calls, a cut answer, or a call that is not ours ────────▶ DONE
                        └─────── calls, and the last round is over ─────────────────────────▶ ToolRoundsExceededError

All calls of a turn are checked before the first one is run, and either all of them are run or none: a model may depend on
all of their effects. If one cannot be run, the model receives the problem of each call, or that it was not run because of
another, and calls again: for an unknown tool, for arguments that are not JSON, and for those that do not fit. A turn that was
cut off is not repeated: the same limit would cut it off again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from deltawire._messages import tool as tool_message
from deltawire._messages import tool_from_openai
from deltawire._tools.function import FunctionTool, ToolArgumentsError, function_tool
from deltawire.v1.chat_completion_pb2 import ChatRequest, StopReason, Usage
from deltawire.v1.message_pb2 import ChatMessage
from deltawire.v1.tool_pb2 import Tool, ToolCall, ToolCallDelta, ToolChoice

if TYPE_CHECKING:
    from deltawire._answer import Answer

# A tool as callers may pass it. A definition alone is sent to the model; a call of it ends the run.
ToolLike: TypeAlias = FunctionTool[..., Any] | Callable[..., Any] | Tool | Mapping[str, Any]
OnError: TypeAlias = Literal["raise", "return"]

_SHOWN = 500  # characters of what the model wrote, repeated to it
_COUNTS = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "reasoning_tokens")


@dataclass(frozen=True, slots=True)
class ToolRun:
    """A conversation with tools.

    Attributes:
        answers: The answers, one for each round, at least one.
        messages: The whole conversation: the given messages, each answer, each result. To continue, append to them and run
            again.
    """

    answers: tuple[Answer, ...]
    messages: tuple[ChatMessage, ...]

    @property
    def answer(self) -> Answer:
        """The last answer. If it still has calls, they were not run: see `Chat.run_tools`."""
        return self.answers[-1]

    @property
    def text(self) -> str:
        """The text of the last answer."""
        return self.answer.text

    @property
    def rounds(self) -> int:
        """The number of requests."""
        return len(self.answers)

    @property
    def usage(self) -> Usage:
        """The tokens of all rounds: a number is absent if one round lacks it; the provenance is the least reliable one."""
        usages = [answer.usage for answer in self.answers]
        total = Usage(provenance=max(usage.provenance for usage in usages))
        for name in _COUNTS:
            if name == "completion_tokens" or all(usage.HasField(name) for usage in usages):  # type: ignore[arg-type]
                setattr(total, name, sum(getattr(usage, name) for usage in usages))
        return total


class ToolRoundsExceededError(RuntimeError):
    """The model still called tools in round `max_rounds`.

    Attributes:
        run: The conversation so far. The calls of its last answer were not run: run them and continue, or give up.
    """

    def __init__(self, run: ToolRun) -> None:
        super().__init__(run)
        self.run = run

    def __str__(self) -> str:
        return f"the model still called tools in round {self.run.rounds}, the last that max_rounds allows"


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call to run: `tool.function(**arguments)`."""

    call: ToolCall
    tool: FunctionTool[..., Any]
    arguments: dict[str, Any]


class ToolLoop:
    """One conversation with tools.

    Args:
        request: The first request; it is not changed.
        tools: The tools, besides those of the request.
        max_rounds: The maximum number of requests.
        on_error: Whether an exception in a function, and a result that cannot be encoded, is raised or returned to the model.

    Attributes:
        request: The next request.

    Raises:
        ValueError: Two tools have one name, or the request has a field that only one answer can have.
        TypeError: A function cannot be a tool.
    """

    def __init__(self, request: ChatRequest, tools: Iterable[ToolLike], *, max_rounds: int, on_error: OnError) -> None:
        if max_rounds < 1:
            message = f"max_rounds must be 1 or more, not {max_rounds}"
            raise ValueError(message)
        if on_error not in ("raise", "return"):
            message = f'on_error must be "raise" or "return", not {on_error!r}'
            raise ValueError(message)
        if request.choice_count > 1:
            message = "choice_count must be 1: the conversation goes on from one answer"
            raise ValueError(message)
        if request.completion_id:
            message = "completion_id names one answer, and tools need several"
            raise ValueError(message)
        self.request = ChatRequest()
        self.request.CopyFrom(request)
        self._max_rounds = max_rounds
        self._on_error = on_error
        self._answers: list[Answer] = []
        self._functions: dict[str, FunctionTool[..., Any]] = {}
        for each in tools:
            self._offer(each)
        names = [each.name for each in self.request.tools]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            message = f"several tools are named {', '.join(repeated)}"
            raise ValueError(message)

    @property
    def functions(self) -> Sequence[FunctionTool[..., Any]]:
        """The tools that can be run."""
        return tuple(self._functions.values())

    @property
    def run(self) -> ToolRun:
        """The conversation so far."""
        return ToolRun(tuple(self._answers), tuple(self.request.messages))

    def receive(self, answer: Answer) -> list[PlannedCall] | None:
        """Take the answer to `request`.

        Returns:
            The calls to run: pass their results to `finish`, then send `request`. None if the conversation has ended:
            `run` has it.

        Raises:
            ToolRoundsExceededError: It has not ended, and this was the last round.
        """
        self._answers.append(answer)
        problems = _problems(answer)
        runnable = answer.tool_calls_executable and all(call.tool_name in self._functions for call in answer.tool_calls)
        if not (runnable or problems):
            self.request.messages.append(answer.message)
            return None
        if len(self._answers) >= self._max_rounds:
            self.request.messages.append(answer.message)
            raise ToolRoundsExceededError(self.run)
        # From the second round on the model must be free to answer: if it must call a tool, it never answers.
        if self.request.tool_choice.mode != ToolChoice.MODE_NONE:
            self.request.ClearField("tool_choice")
        planned: list[PlannedCall] = []
        for call in answer.tool_calls:
            function = self._functions.get(call.tool_name)
            try:
                if function is not None:
                    planned.append(PlannedCall(call, function, function.parse(call.arguments)))
            except ToolArgumentsError as error:
                problems[call.call_id] = f"the arguments do not fit: {error}"
        self.request.messages.append(_turn(answer))
        if not problems:
            return planned
        for call in self.request.messages[-1].assistant.tool_calls:
            problem = problems.get(call.call_id, "another call of the same turn cannot be run; call again")
            self.request.messages.append(tool_message(call, f"Not run: {problem}"))
        return []

    def finish(self, planned: Sequence[PlannedCall], results: Sequence[str]) -> None:
        """Take the results of the calls, in their order."""
        for each, result in zip(planned, results, strict=True):
            self.request.messages.append(tool_message(each.call, result))

    def returned(self, planned: PlannedCall, result: object) -> str:
        """The tool result for what a function returned.

        Raises:
            Exception: It cannot be encoded, and `on_error` is "raise".
        """
        if self._on_error == "return" and isinstance(result, str):
            result = _sendable(result)
        try:
            return planned.tool.result_text(result)
        except Exception as error:  # noqa: BLE001 (a result may be of any class, whose own code makes JSON of it)
            return self.failed(planned, error)

    def failed(self, planned: PlannedCall, error: Exception) -> str:
        """The tool result for an exception in a function, or for a result that cannot be encoded.

        Raises:
            Exception: The same one, if `on_error` is "raise".
        """
        if self._on_error == "raise":
            error.add_note(f"in the tool {planned.tool.name!r}, called by the model as {planned.call.call_id!r}")
            raise error
        try:
            text = str(error)
        except Exception:  # noqa: BLE001 (the exception's own code)
            text = "its message cannot be read"
        return f"Failed: {type(error).__name__}: {_sendable(text)}"

    def _offer(self, each: ToolLike) -> None:
        if isinstance(each, Tool):
            self.request.tools.append(each)
        elif isinstance(each, Mapping):
            self.request.tools.append(tool_from_openai(each))
        else:
            function = each if isinstance(each, FunctionTool) else function_tool(each)
            self._functions[function.name] = function
            self.request.tools.append(function.definition)


def _sendable(text: str) -> str:
    """Text with its lone surrogates replaced: UTF-8 has none, and file names can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _problems(answer: Answer) -> dict[str, str]:
    """The tool results for failed calls, by call id; empty if there are none, or if the model cannot receive them."""
    failed = answer.failed_tool_calls
    if answer.stop_reason != StopReason.STOP_REASON_END_OF_MESSAGE or not all(each.tool_name for each in failed):
        return {}
    return {each.call_id: _problem(each) for each in failed}


def _problem(failed: ToolCallDelta) -> str:
    raw = failed.failure.raw_arguments
    problem = failed.failure.message
    if failed.failure.instance_path:
        problem = f"at {failed.failure.instance_path}, {problem}"
    return problem if _is_object(raw) else f"{problem}. You wrote: {raw[:_SHOWN]}"


def _turn(answer: Answer) -> ChatMessage:
    """The model's turn with its failed calls too, so that each can be answered; they come last."""
    turn = ChatMessage()
    turn.CopyFrom(answer.message)
    for each in answer.failed_tool_calls:
        raw = each.failure.raw_arguments
        # Text that is not JSON cannot be sent as arguments: chat templates parse them.
        turn.assistant.tool_calls.add(
            call_id=each.call_id, tool_name=each.tool_name, arguments=raw if _is_object(raw) else "{}"
        )
    return turn


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
