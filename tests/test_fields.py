"""Every field of what ChatCompletion takes and gives, with the tests that show it: before the look-alike, and on a real vLLM.

Two tables, `TAKEN` and `GIVEN`, by message and field; an enum's values stand where a field has them first. A message that is in
both directions has rows in both. Each row says two things:

1. The test that shows that the field becomes the right part of vLLM's body, or does in the gateway what it says; or that it is
   reported correctly. Its vLLM is a fake, or a recording of a real one.
2. The test that shows it on a real vLLM. `Accepted` is a test that only shows that vLLM takes it, and why no more can be seen;
   `NotShown` is why none can show it, with the small model and the flags that the tests have.

Someone who adds a field adds a row, and with it the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from deltawire.v1 import chat_completion_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor import Descriptor, EnumDescriptor

ROOT = Path(__file__).parents[1]
SERVICE = chat_completion_pb2.DESCRIPTOR.services_by_name["ChatCompletion"]

ELSEWHERE = frozenset({"ErrorReason"})
"""Enums whose values have tables of their own: tests/rpc/test_status.py and tests/rpc/test_failures.py."""


@dataclass(frozen=True)
class Accepted:
    """A test on a real vLLM that shows that it takes the field, and why it cannot show what comes of it."""

    test: str
    why: str


@dataclass(frozen=True)
class NotShown:
    """Why no test shows it."""

    why: str


Row = tuple[str | NotShown, str | Accepted | NotShown]
Table = dict[str, dict[str, Row]]

# Where the tests are: with the look-alike
BODY = "tests/upstream/test_request_fields.py::test_field[{}]".format
EFFORT = "tests/upstream/test_request_fields.py::test_every_effort[{}]".format
REQUEST = partial("{}::{}".format, "tests/upstream/test_vllm_request.py")
PROVIDER = partial("{}::{}".format, "tests/upstream/test_vllm_checks.py")
CONTENT = partial("{}::{}".format, "tests/rpc/test_validate_content.py")
CHAT = partial("{}::{}".format, "tests/rpc/test_chat_completion.py")
RETAINED = partial("{}::{}".format, "tests/rpc/test_retained.py")
OPERATORS = partial("{}::{}".format, "tests/rpc/test_operators.py")
WORKERS = "tests/processes/test_operators.py"
POLICY = partial("{}::{}".format, "tests/rpc/test_tool_policy.py")
COUNT = partial("{}::{}".format, "tests/rpc/test_count_tokens.py")
FAULTS = partial("{}::{}".format, "tests/rpc/test_failures.py")
CONVERT = partial("{}::{}".format, "tests/rpc/test_convert.py")
COMPLETION = partial("{}::{}".format, "tests/completions/test_completion.py")
CONTRACT = partial("{}::{}".format, "tests/sansio/test_contract.py")
USAGE = partial("{}::{}".format, "tests/sansio/test_usage.py")
# and with a real vLLM
REAL_REQUESTS = partial("{}::{}".format, "tests/e2e/test_requests.py")
REAL_TEXT = partial("{}::{}".format, "tests/e2e/test_text.py")
REAL_FORMATS = partial("{}::{}".format, "tests/e2e/test_formats.py")
REAL_TOOLS = partial("{}::{}".format, "tests/e2e/test_tools.py")
REAL_IMAGES = partial("{}::{}".format, "tests/e2e/test_images.py")
REAL_COUNT = partial("{}::{}".format, "tests/e2e/test_count_tokens.py")
REAL_SHAPING = partial("{}::{}".format, "tests/e2e/test_shaping.py")
REAL_COMPLETIONS = partial("{}::{}".format, "tests/e2e/test_completions.py")
REAL_FAULTS = partial("{}::{}".format, "tests/e2e/test_failures.py")

OURS = NotShown("the gateway's own records, in which nothing depends on vLLM")
NO_REASONING = NotShown(
    "the server has no reasoning parser; tests/sansio/test_recordings.py has recordings of real ones"
)
TEXT_ONLY = NotShown("never given: what a model says is text")
TEXT_ALONE = NotShown("an answer's message has text, in `text`; parts are for requests")
ONE_REPLICA = NotShown("the provider is one server, whose document names all its fields")

ROLES = REAL_TEXT("test_roles_and_parts")
ONE_TOKEN = "test_fields_that_leave_the_likeliest_token[{}]".format
STREAMED = REAL_TEXT("test_a_streamed_text")
STRICT_CALL = REAL_TOOLS("test_a_required_strict_call_follows_its_schema")
INCREMENTAL = REAL_SHAPING("test_incremental_calls")
SCHEMA_CHECK = REAL_SHAPING("test_schema_validation_on_request")
MALFORMED = REAL_TOOLS("test_malformed_arguments_fail_with_their_text")
REAL_LOGPROBS = REAL_TEXT("test_log_probabilities_of_every_token")
KILLED_ENGINE = REAL_FAULTS("test_an_engine_that_is_killed")
SOFT_CANCEL = REAL_COMPLETIONS("test_a_soft_cancel")
REAL_STATES = REAL_COMPLETIONS("test_states_of_a_completion")
REAL_REPLAY = REAL_COMPLETIONS("test_a_replay_is_identical")
REAL_GIVEN_UP = REAL_COMPLETIONS("test_the_record_of_a_cancelled_call")
REAL_LEFT = REAL_COMPLETIONS("test_a_retained_stream_continues_without_its_caller")

EVERYTHING = CHAT("test_everything_that_an_answer_can_hold")
RECORDINGS = CHAT("test_recordings_keep_the_contract")
EACH_EVENT = CONVERT("test_each_event")
WHOLE_END = CONVERT("test_completed")
VERDICTS = CONTRACT("test_5_the_first_reason_that_applies")
WORDS = CONTRACT("test_7_stop_reasons[{}]").format

SAMPLING = tuple(field.name for field in chat_completion_pb2.Sampling.DESCRIPTOR.fields)

TAKEN: Table = {
    "CreateChatCompletionRequest": {
        "chat": (CHAT("test_create_is_the_end_of_the_stream"), REAL_TEXT("test_a_unary_text")),
    },
    "StreamChatCompletionRequest": {
        "chat": (CHAT("test_the_whole_request_reaches_vllm"), STREAMED),
        "resume": (RETAINED("test_a_caller_that_goes_leaves_the_engine_at_work"), REAL_LEFT),
        "options": (RETAINED("test_a_replay_is_the_same_to_the_bit"), REAL_REPLAY),
    },
    "ResumePoint": {
        "completion_id": (RETAINED("test_a_replay_is_the_same_to_the_bit"), REAL_REPLAY),
        "last_sequence": (RETAINED("test_a_replay_is_the_same_to_the_bit"), REAL_REPLAY),
    },
    "StreamOptions": {
        "usage_updates": (COMPLETION("test_usage_updates"), REAL_SHAPING("test_usage_updates_grow_to_the_final_usage")),
        "max_coalesce_delay": (
            COMPLETION("test_deltas_are_merged_within_the_coalesce_delay"),
            REAL_SHAPING("test_coalesced_deltas"),
        ),
        "heartbeat_interval": (
            COMPLETION("test_heartbeats"),
            REAL_SHAPING("test_heartbeats_of_a_suspended_engine"),
        ),
        "early_heartbeats": (
            COMPLETION("test_early_heartbeats"),
            REAL_SHAPING("test_heartbeats_during_prefill"),
        ),
        "retention": (
            RETAINED("test_a_stream_that_nobody_comes_back_to"),
            REAL_COMPLETIONS("test_a_retained_stream_without_a_reader_expires"),
        ),
    },
    "CancelChatCompletionRequest": {
        "completion_id": (RETAINED("test_a_soft_cancel"), SOFT_CANCEL),
        "caller": (OPERATORS("test_an_operator_cancels"), OURS),
    },
    "GetChatCompletionRequest": {
        "completion_id": (RETAINED("test_states_of_a_retained_completion"), REAL_STATES),
        "caller": (OPERATORS("test_which_completion_an_operator_means"), OURS),
    },
    "CountTokensRequest": {
        "chat": (
            COUNT("test_a_count_is_what_the_completion_costs"),
            REAL_COUNT("test_a_count_equals_the_prompt_tokens"),
        ),
    },
    "ChatRequest": {
        "model": (BODY("chat.model"), "tests/e2e/test_errors.py::test_an_unknown_model_is_not_found"),
        "messages": (CHAT("test_the_whole_request_reaches_vllm"), ROLES),
        "tools": (BODY("chat.tools.name"), REAL_REQUESTS("test_the_description_of_a_tool")),
        "tool_choice": (BODY("chat.tool_choice.mode"), STRICT_CALL),
        "allowed_tools": (BODY("chat.allowed_tools"), REAL_REQUESTS("test_only_allowed_tools_are_shown")),
        "parallel_tool_calls": (
            BODY("chat.parallel_tool_calls"),
            REAL_TOOLS("test_parallel_tool_calls_false"),
        ),
        "sampling": (BODY("chat.sampling.temperature"), REAL_TEXT("test_every_sampling_field_is_accepted")),
        "response_format": (BODY("chat.response_format.regex"), REAL_FORMATS("test_regex")),
        "logprobs": (BODY("chat.logprobs.top_k"), REAL_TEXT("test_log_probabilities_without_alternatives")),
        "choice_count": (BODY("chat.choice_count"), REAL_REQUESTS("test_several_answers_with_log_probabilities")),
        "reasoning": (BODY("chat.reasoning.effort"), REAL_REQUESTS("test_every_effort")),
        "tool_call_policy": (BODY("chat.tool_call_policy.streaming"), INCREMENTAL),
        "soft_time_limit": (RETAINED("test_a_soft_time_limit"), REAL_COMPLETIONS("test_the_soft_time_limit")),
        "completion_id": (RETAINED("test_an_id_that_is_taken"), SOFT_CANCEL),
        "priority": (
            BODY("chat.priority"),
            Accepted(REAL_REQUESTS("test_taken[priority0]"), "the server has no --scheduling-policy priority"),
        ),
        "cache_salt": (
            BODY("chat.cache_salt"),
            Accepted(REAL_REQUESTS("test_taken[cache_salt0]"), "what is in the cache is not seen from outside"),
        ),
        "chat_template_kwargs": (BODY("chat.chat_template_kwargs"), REAL_REQUESTS("test_template_arguments")),
        "extra_body": (BODY("chat.extra_body"), REAL_REQUESTS("test_extra_fields")),
        "user": (BODY("chat.user"), Accepted(REAL_REQUESTS("test_taken[user]"), "vLLM makes no use of it")),
    },
    "ChatMessage": {
        "system": (BODY("chat.messages.system.content.text"), ROLES),
        "developer": (BODY("chat.messages.developer.content.text"), ROLES),
        "user": (BODY("chat.messages.user.content.text"), ROLES),
        "assistant": (BODY("chat.messages.assistant.content.text"), ROLES),
        "tool": (BODY("chat.messages.tool.content.text"), REAL_TOOLS("test_a_tool_result")),
    },
    "SystemMessage": {
        "text": (BODY("chat.messages.system.text"), ROLES),
        "content": (BODY("chat.messages.system.content.text"), ROLES),
    },
    "DeveloperMessage": {
        "text": (BODY("chat.messages.developer.text"), ROLES),
        "content": (BODY("chat.messages.developer.content.text"), ROLES),
    },
    "UserMessage": {
        "text": (BODY("chat.messages.user.text"), ROLES),
        "content": (BODY("chat.messages.user.content.text"), ROLES),
    },
    "AssistantMessage": {
        "text": (
            BODY("chat.messages.assistant.text"),
            REAL_SHAPING("test_text_with_calls_and_empty_turns_are_accepted"),
        ),
        "content": (BODY("chat.messages.assistant.content.text"), ROLES),
        "reasoning": (
            BODY("chat.messages.assistant.reasoning"),
            Accepted(REAL_REQUESTS("test_reasoning_of_an_earlier_turn"), "the model's template leaves it out"),
        ),
        "tool_calls": (
            BODY("chat.messages.assistant.tool_calls.tool_name"),
            REAL_SHAPING("test_messages_of_completed_are_accepted_as_turns"),
        ),
    },
    "ToolMessage": {
        "call_id": (
            BODY("chat.messages.tool.call_id"),
            Accepted(REAL_REQUESTS("test_an_earlier_call"), "it only binds the result: no template shows it"),
        ),
        "text": (BODY("chat.messages.tool.text"), REAL_TOOLS("test_a_tool_result")),
        "content": (
            BODY("chat.messages.tool.content.text"),
            Accepted(REAL_REQUESTS("test_an_earlier_call"), "its parts reach the model as those of every other turn"),
        ),
    },
    "ContentPart": {
        "text": (BODY("chat.messages.user.content.text"), REAL_COUNT("test_a_count_equals_the_prompt_tokens[text]")),
        "image": (REQUEST("test_images"), REAL_IMAGES("test_every_form_of_an_image")),
    },
    "Image": {
        "url": (CONTENT("test_bytes_say_what_an_image_is"), REAL_IMAGES("test_every_form_of_an_image")),
        "data": (CONTENT("test_bytes_say_what_an_image_is"), REAL_IMAGES("test_every_form_of_an_image")),
    },
    "ToolCall": {
        "call_id": (
            BODY("chat.messages.assistant.tool_calls.call_id"),
            Accepted(REAL_REQUESTS("test_an_earlier_call"), "it only binds the result: no template shows it"),
        ),
        "tool_name": (
            BODY("chat.messages.assistant.tool_calls.tool_name"),
            REAL_REQUESTS("test_an_earlier_call"),
        ),
        "arguments": (
            BODY("chat.messages.assistant.tool_calls.arguments"),
            REAL_REQUESTS("test_an_earlier_call"),
        ),
    },
    "Tool": {
        "name": (BODY("chat.tools.name"), REAL_REQUESTS("test_the_description_of_a_tool")),
        "description": (BODY("chat.tools.description"), REAL_REQUESTS("test_the_description_of_a_tool")),
        "input_schema": (BODY("chat.tools.input_schema"), REAL_TOOLS("test_a_schema_is_sent_verbatim")),
        "output_schema": (BODY("chat.tools.output_schema"), REAL_REQUESTS("test_the_description_of_a_tool")),
        "strict": (BODY("chat.tools.strict"), STRICT_CALL),
    },
    "ToolChoice": {
        "mode": (BODY("chat.tool_choice.mode"), STRICT_CALL),
        "tool_name": (BODY("chat.tool_choice.tool_name"), REAL_TOOLS("test_a_named_tool_is_called")),
    },
    "ToolChoice.Mode": {
        "MODE_AUTO": (REQUEST("test_each_field_alone"), INCREMENTAL),
        "MODE_REQUIRED": (BODY("chat.tool_choice.mode"), STRICT_CALL),
        "MODE_NONE": (
            REQUEST("test_none_keeps_the_tools_from_the_model"),
            REAL_TOOLS("test_tool_choice_none"),
        ),
    },
    "ToolCallPolicy": {
        "streaming": (POLICY("test_incremental_calls_are_told_piece_by_piece"), INCREMENTAL),
        "validate_schema": (POLICY("test_arguments_are_held_to_the_schema_on_demand"), SCHEMA_CHECK),
    },
    "ToolCallStreaming": {
        "TOOL_CALL_STREAMING_ASSEMBLED": (CONTRACT("test_4_assembled_calls_have_only_verdicts"), INCREMENTAL),
        "TOOL_CALL_STREAMING_INCREMENTAL": (POLICY("test_incremental_calls_are_told_piece_by_piece"), INCREMENTAL),
    },
    "Sampling": {
        "temperature": (BODY("chat.sampling.temperature"), REAL_REQUESTS(ONE_TOKEN("temperature"))),
        "top_p": (BODY("chat.sampling.top_p"), REAL_REQUESTS(ONE_TOKEN("top_p"))),
        "top_k": (BODY("chat.sampling.top_k"), REAL_REQUESTS(ONE_TOKEN("top_k"))),
        "min_p": (BODY("chat.sampling.min_p"), REAL_REQUESTS(ONE_TOKEN("min_p"))),
        "frequency_penalty": (
            BODY("chat.sampling.frequency_penalty"),
            REAL_REQUESTS("test_penalties[frequency_penalty-2.0]"),
        ),
        "presence_penalty": (
            BODY("chat.sampling.presence_penalty"),
            REAL_REQUESTS("test_penalties[presence_penalty-2.0]"),
        ),
        "repetition_penalty": (
            BODY("chat.sampling.repetition_penalty"),
            REAL_REQUESTS("test_penalties[repetition_penalty-1.8]"),
        ),
        "seed": (BODY("chat.sampling.seed"), REAL_REQUESTS("test_seeds_differ")),
        "max_tokens": (BODY("chat.sampling.max_tokens"), STREAMED),
        "min_tokens": (BODY("chat.sampling.min_tokens"), REAL_REQUESTS("test_min_tokens")),
        "stop": (BODY("chat.sampling.stop"), REAL_TEXT("test_a_stop_text")),
        "stop_token_ids": (
            BODY("chat.sampling.stop_token_ids"),
            REAL_TEXT("test_a_stop_token"),
        ),
        "ignore_eos": (BODY("chat.sampling.ignore_eos"), REAL_REQUESTS("test_ignore_eos")),
        "logit_bias": (BODY("chat.sampling.logit_bias"), REAL_TEXT("test_a_bias_forces_a_token")),
        "bad_words": (BODY("chat.sampling.bad_words"), REAL_REQUESTS("test_bad_words")),
    },
    "ResponseFormat": {
        "text": (BODY("chat.response_format.text"), REAL_FORMATS("test_text")),
        "json_object": (BODY("chat.response_format.json_object"), REAL_FORMATS("test_json_object")),
        "json_schema": (BODY("chat.response_format.json_schema.schema"), REAL_FORMATS("test_json_schema[None]")),
        "grammar": (BODY("chat.response_format.grammar"), REAL_FORMATS("test_grammar[gbnf]")),
        "regex": (BODY("chat.response_format.regex"), REAL_FORMATS("test_regex")),
        "choice": (BODY("chat.response_format.choice.values"), REAL_FORMATS("test_choice")),
        "structural_tag": (BODY("chat.response_format.structural_tag"), REAL_FORMATS("test_structural_tag")),
    },
    "ResponseFormat.JsonSchema": {
        "name": (
            BODY("chat.response_format.json_schema.name"),
            Accepted(REAL_FORMATS("test_json_schema[None]"), "vLLM asks for one and makes no use of it"),
        ),
        "schema": (BODY("chat.response_format.json_schema.schema"), REAL_FORMATS("test_json_schema[None]")),
        "strict": (
            BODY("chat.response_format.json_schema.strict"),
            Accepted(REAL_FORMATS("test_json_schema[True]"), "vLLM guides by the schema either way"),
        ),
    },
    "ResponseFormat.Choice": {"values": (BODY("chat.response_format.choice.values"), REAL_FORMATS("test_choice"))},
    "Logprobs": {"top_k": (BODY("chat.logprobs.top_k"), REAL_LOGPROBS)},
    "Reasoning": {
        "effort": (BODY("chat.reasoning.effort"), REAL_REQUESTS("test_every_effort")),
        "token_budget": (
            BODY("chat.reasoning.token_budget"),
            Accepted(
                REAL_REQUESTS("test_a_token_budget_without_a_reasoning_parser"),
                "the server has no reasoning parser, and says that it needs one",
            ),
        ),
        "include": (
            BODY("chat.reasoning.include"),
            Accepted(REAL_REQUESTS("test_taken[reasoning1]"), "the server has no reasoning parser"),
        ),
    },
    "ReasoningEffort": {
        f"REASONING_EFFORT_{word.upper()}": (
            EFFORT(f"REASONING_EFFORT_{word.upper()}-{word}"),
            REAL_REQUESTS("test_every_effort"),
        )
        for word in ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    },
    "ListChatCompletionsRequest": {
        "page_size": (OPERATORS("test_pages_while_completions_come_and_go"), OURS),
        "page_token": (OPERATORS("test_pages_while_completions_come_and_go"), OURS),
        "caller": (OPERATORS("test_filters"), OURS),
        "model": (OPERATORS("test_filters"), OURS),
        "provider_id": (OPERATORS("test_filters"), OURS),
        "states": (OPERATORS("test_filters"), OURS),
        "create_time_from": (OPERATORS("test_filters"), OURS),
    },
    "CompletionState": dict.fromkeys(
        ("COMPLETION_STATE_RUNNING", "COMPLETION_STATE_COMPLETED", "COMPLETION_STATE_FAILED"),
        (OPERATORS("test_filters"), OURS),
    ),
}

GIVEN: Table = {
    "CreateChatCompletionResponse": {
        "started": (
            CHAT("test_create_is_the_end_of_the_stream"),
            REAL_COMPLETIONS("test_a_soft_cancel_of_a_unary_call"),
        ),
        "completed": (CHAT("test_create_is_the_end_of_the_stream"), REAL_TEXT("test_a_unary_text")),
    },
    "StreamChatCompletionResponse": {
        "sequence": (RECORDINGS, STREAMED),
        "choice_index": (RECORDINGS, REAL_TEXT("test_two_choices")),
        "started": (RECORDINGS, STREAMED),
        "text_delta": (RECORDINGS, STREAMED),
        "reasoning_delta": (RECORDINGS, NO_REASONING),
        "tool_call_delta": (RECORDINGS, STRICT_CALL),
        "choice_finished": (RECORDINGS, STREAMED),
        "usage_update": (COMPLETION("test_usage_updates"), REAL_SHAPING("test_usage_updates_grow_to_the_final_usage")),
        "notice": (COMPLETION("test_notices_follow_started"), ONE_REPLICA),
        "heartbeat": (COMPLETION("test_heartbeats"), REAL_SHAPING("test_heartbeats_of_a_suspended_engine")),
        "completed": (RECORDINGS, STREAMED),
    },
    "Started": {
        "completion_id": (CHAT("test_started"), STREAMED),
        "model": (CHAT("test_a_registered_models_names"), STREAMED),
        "alias": (CHAT("test_a_registered_models_names"), STREAMED),
        "provider_id": (CHAT("test_started"), STREAMED),
        "create_time": (CHAT("test_started"), REAL_REPLAY),
        "effective_sampling": (CHAT("test_the_operators_max_tokens"), STREAMED),
    },
    "Sampling": dict.fromkeys(SAMPLING, (CHAT("test_started"), REAL_TEXT("test_every_sampling_field_is_accepted"))),
    "TextDelta": {
        "text": (RECORDINGS, REAL_TEXT("test_characters_are_unchanged")),
        "logprobs": (EVERYTHING, REAL_TEXT("test_log_probabilities_of_every_token[streamed]")),
    },
    "ReasoningDelta": {"text": (EVERYTHING, NO_REASONING), "logprobs": (EVERYTHING, NO_REASONING)},
    "TokenLogprob": {
        "token": (EVERYTHING, REAL_LOGPROBS),
        "logprob": (EVERYTHING, REAL_LOGPROBS),
        "raw_bytes": (EVERYTHING, REAL_LOGPROBS),
        "alternatives": (EVERYTHING, REAL_LOGPROBS),
    },
    "TokenLogprob.Alternative": {
        "token": (EVERYTHING, REAL_LOGPROBS),
        "logprob": (EVERYTHING, REAL_LOGPROBS),
        "raw_bytes": (EVERYTHING, REAL_LOGPROBS),
    },
    "ToolCallDelta": {
        "index": (RECORDINGS, REAL_TOOLS("test_two_calls_in_one_answer")),
        "call_id": (EACH_EVENT, STRICT_CALL),
        "tool_name": (EACH_EVENT, STRICT_CALL),
        "parse_status": (EACH_EVENT, INCREMENTAL),
        "arguments_fragment": (POLICY("test_incremental_calls_are_told_piece_by_piece"), INCREMENTAL),
        "tool_call": (EVERYTHING, STRICT_CALL),
        "failure": (EVERYTHING, MALFORMED),
    },
    "ToolCallParseStatus": {
        "TOOL_CALL_PARSE_STATUS_STARTED": (EACH_EVENT, INCREMENTAL),
        "TOOL_CALL_PARSE_STATUS_IN_PROGRESS": (EACH_EVENT, INCREMENTAL),
        "TOOL_CALL_PARSE_STATUS_SUCCEEDED": (EACH_EVENT, STRICT_CALL),
        "TOOL_CALL_PARSE_STATUS_FAILED": (EACH_EVENT, MALFORMED),
    },
    "ToolCall": {
        "call_id": (EVERYTHING, STRICT_CALL),
        "tool_name": (EVERYTHING, STRICT_CALL),
        "arguments": (EVERYTHING, REAL_TOOLS("test_two_calls_in_one_answer")),
    },
    "ToolCallFailure": {
        "reason": (VERDICTS, MALFORMED),
        "message": (CONVERT("test_each_event"), SCHEMA_CHECK),
        "byte_offset": (VERDICTS, MALFORMED),
        "raw_arguments": (VERDICTS, MALFORMED),
        "instance_path": (POLICY("test_arguments_are_held_to_the_schema_on_demand"), SCHEMA_CHECK),
    },
    "ToolCallFailureReason": {
        "TOOL_CALL_FAILURE_REASON_MISSING_NAME": (
            VERDICTS,
            NotShown("the server's parser, hermes, sends nothing for a call without a name"),
        ),
        "TOOL_CALL_FAILURE_REASON_UNKNOWN_TOOL": (VERDICTS, REAL_TOOLS("test_an_unknown_tool_fails")),
        "TOOL_CALL_FAILURE_REASON_TRUNCATED": (VERDICTS, REAL_TOOLS("test_a_cut_call_is_truncated")),
        "TOOL_CALL_FAILURE_REASON_MALFORMED_JSON": (VERDICTS, MALFORMED),
        "TOOL_CALL_FAILURE_REASON_NOT_AN_OBJECT": (VERDICTS, REAL_TOOLS("test_arguments_that_are_no_object_fail")),
        "TOOL_CALL_FAILURE_REASON_SCHEMA_MISMATCH": (
            CONTRACT("test_5_the_schema_is_checked_last"),
            SCHEMA_CHECK,
        ),
    },
    "ChoiceFinished": {
        "stop_reason": (RECORDINGS, SOFT_CANCEL),
        "engine_finish_reason": (RECORDINGS, SOFT_CANCEL),
        "matched_stop": (
            CHAT("test_what_made_the_engine_stop"),
            REAL_TEXT("test_a_stop_text"),
        ),
        "matched_token_id": (
            CHAT("test_what_made_the_engine_stop"),
            REAL_TEXT("test_a_stop_token"),
        ),
        "tool_calls_executable": (RECORDINGS, STRICT_CALL),
    },
    "StopReason": {
        "STOP_REASON_END_OF_TURN": (CHAT("test_text_usage_and_times"), REAL_TEXT("test_a_unary_text")),
        "STOP_REASON_END_OF_MESSAGE": (EVERYTHING, STRICT_CALL),
        "STOP_REASON_OUT_OF_TOKENS": (WORDS("length-StopReason.OUT_OF_TOKENS"), STREAMED),
        "STOP_REASON_STOP_SEQUENCE": (
            CHAT("test_what_made_the_engine_stop"),
            REAL_TEXT("test_a_stop_text"),
        ),
        "STOP_REASON_CONTENT_FILTER": (
            WORDS("content_filter-StopReason.CONTENT_FILTER"),
            NotShown("vLLM has no content filter; other engines that speak as it does have"),
        ),
        "STOP_REASON_REPETITION": (
            WORDS("repetition-StopReason.REPETITION"),
            REAL_REQUESTS("test_a_model_that_repeats_itself"),
        ),
        "STOP_REASON_CANCELLED": (RETAINED("test_a_soft_cancel"), SOFT_CANCEL),
        "STOP_REASON_TIME_LIMIT": (
            RETAINED("test_a_soft_time_limit"),
            REAL_COMPLETIONS("test_the_soft_time_limit"),
        ),
        "STOP_REASON_UPSTREAM_INCOMPLETE": (FAULTS("test_after_the_first_event[reset]"), KILLED_ENGINE),
        "STOP_REASON_ERROR": (
            FAULTS("test_after_the_first_event[an error event]"),
            REAL_FAULTS("test_an_engine_that_gets_sigterm"),
        ),
    },
    "UsageUpdate": {
        "usage": (COMPLETION("test_usage_updates"), REAL_SHAPING("test_usage_updates_grow_to_the_final_usage"))
    },
    "Usage": {
        "prompt_tokens": (WHOLE_END, STREAMED),
        "completion_tokens": (CHAT("test_text_usage_and_times"), STREAMED),
        "cached_prompt_tokens": (
            USAGE("test_the_exact_account_names_cached_and_reasoning_tokens"),
            NotShown("vLLM sends it only with --enable-prompt-tokens-details"),
        ),
        "reasoning_tokens": (USAGE("test_the_exact_account_names_cached_and_reasoning_tokens"), NO_REASONING),
        "provenance": (CHAT("test_text_usage_and_times"), STREAMED),
    },
    "UsageProvenance": {
        "USAGE_PROVENANCE_EXACT": (CHAT("test_text_usage_and_times"), STREAMED),
        "USAGE_PROVENANCE_LOWER_BOUND": (USAGE("test_figures_of_a_cut_answer_are_a_lower_bound"), SOFT_CANCEL),
        "USAGE_PROVENANCE_ESTIMATED": (
            FAULTS("test_usage_without_any_figure_is_estimated"),
            REAL_COMPLETIONS("test_a_soft_cancel_of_a_suspended_engine"),
        ),
    },
    "Notice": {
        "kind": (EACH_EVENT, ONE_REPLICA),
        "message": (EACH_EVENT, ONE_REPLICA),
        "field": (EACH_EVENT, ONE_REPLICA),
    },
    "NoticeKind": {
        "NOTICE_KIND_ANOTHER_REPLICA": (PROVIDER("test_another_replica_is_told"), ONE_REPLICA),
        "NOTICE_KIND_FIELDS_NOT_CHECKED": (PROVIDER("test_fields_that_cannot_be_checked_are_told"), ONE_REPLICA),
    },
    "Completed": {
        "usage": (CHAT("test_text_usage_and_times"), STREAMED),
        "timings": (CHAT("test_text_usage_and_times"), REAL_SHAPING("test_timings_are_consistent")),
        "choices": (RECORDINGS, REAL_TEXT("test_two_choices")),
        "error": (FAULTS("test_after_the_first_event"), KILLED_ENGINE),
        "messages_omitted": (
            CHAT("test_messages_are_left_out_above_the_limit"),
            REAL_SHAPING("test_completed_omits_messages_above_the_limit"),
        ),
    },
    "Timings": dict.fromkeys(
        ("queue", "first_event_latency", "mean_gap", "worst_gap", "total"),
        (COMPLETION("test_timings"), REAL_SHAPING("test_timings_are_consistent")),
    ),
    "Completed.Choice": {
        "index": (RECORDINGS, REAL_TEXT("test_two_choices")),
        "message": (WHOLE_END, REAL_SHAPING("test_messages_of_completed_are_accepted_as_turns")),
        "failed_tool_calls": (WHOLE_END, MALFORMED),
        "stop_reason": (WHOLE_END, SOFT_CANCEL),
        "tool_calls_executable": (RECORDINGS, STRICT_CALL),
        "engine_finish_reason": (RECORDINGS, STREAMED),
        "logprobs": (
            CHAT("test_create_is_the_end_of_the_stream"),
            REAL_TEXT("test_log_probabilities_of_every_token[whole]"),
        ),
        "matched_stop": (
            CHAT("test_what_made_the_engine_stop"),
            REAL_TEXT("test_a_stop_text"),
        ),
        "matched_token_id": (
            CHAT("test_what_made_the_engine_stop"),
            REAL_TEXT("test_a_stop_token"),
        ),
    },
    "AssistantMessage": {
        "text": (RECORDINGS, STREAMED),
        "content": (TEXT_ALONE, TEXT_ALONE),
        "reasoning": (RECORDINGS, NO_REASONING),
        "tool_calls": (RECORDINGS, STRICT_CALL),
    },
    "ContentPart": {"text": (TEXT_ALONE, TEXT_ALONE), "image": (TEXT_ONLY, TEXT_ONLY)},
    "Image": {"url": (TEXT_ONLY, TEXT_ONLY), "data": (TEXT_ONLY, TEXT_ONLY)},
    "Completed.Error": {
        "code": (CONVERT("test_a_fault"), KILLED_ENGINE),
        "reason": (CONVERT("test_a_fault"), KILLED_ENGINE),
        "message": (CONVERT("test_a_fault"), KILLED_ENGINE),
    },
    "CancelChatCompletionResponse": {
        "state": (RETAINED("test_a_soft_cancel"), SOFT_CANCEL),
        "usage": (RETAINED("test_a_soft_cancel"), SOFT_CANCEL),
    },
    "CompletionState": {
        "COMPLETION_STATE_RUNNING": (RETAINED("test_states_of_a_retained_completion"), REAL_LEFT),
        "COMPLETION_STATE_COMPLETED": (RETAINED("test_states_of_a_retained_completion"), REAL_STATES),
        "COMPLETION_STATE_FAILED": (RETAINED("test_states_of_one_that_is_not_retained"), REAL_GIVEN_UP),
    },
    "GetChatCompletionResponse": {
        "completion_id": (RETAINED("test_states_of_a_retained_completion"), REAL_STATES),
        "state": (RETAINED("test_states_of_a_retained_completion"), REAL_STATES),
        "started": (RETAINED("test_states_of_a_retained_completion"), REAL_STATES),
        "usage": (RETAINED("test_states_of_a_retained_completion"), REAL_STATES),
        "completed": (RETAINED("test_states_of_a_retained_completion"), REAL_REPLAY),
        "error": (RETAINED("test_states_of_one_that_is_not_retained"), REAL_GIVEN_UP),
        "last_sequence": (RETAINED("test_states_of_a_retained_completion"), REAL_REPLAY),
        "expire_time": (RETAINED("test_states_of_a_retained_completion"), REAL_LEFT),
    },
    "ListChatCompletionsResponse": {
        "completions": (OPERATORS("test_entries"), OURS),
        "next_page_token": (OPERATORS("test_pages_while_completions_come_and_go"), OURS),
        "unreachable_workers": (f"{WORKERS}::test_a_worker_that_does_not_answer", OURS),
    },
    "CompletionSummary": {
        "completion_id": (OPERATORS("test_entries"), OURS),
        "caller": (OPERATORS("test_entries"), OURS),
        "model": (OPERATORS("test_entries"), OURS),
        "alias": (OPERATORS("test_entries"), OURS),
        "provider_id": (OPERATORS("test_entries"), OURS),
        "replica": (OPERATORS("test_entries"), OURS),
        "state": (OPERATORS("test_entries"), OURS),
        "stop_reasons": (OPERATORS("test_entries"), OURS),
        "error_code": (OPERATORS("test_entries"), OURS),
        "error_reason": (OPERATORS("test_entries"), OURS),
        "usage": (OPERATORS("test_entries"), OURS),
        "create_time": (OPERATORS("test_entries"), OURS),
        "end_time": (OPERATORS("test_entries"), OURS),
        "time_limit": (OPERATORS("test_entries"), OURS),
        "expire_time": (OPERATORS("test_entries"), OURS),
        "process": (OPERATORS("test_entries"), OURS),
        "worker": (f"{WORKERS}::test_a_list_has_all_workers", OURS),
    },
    "CountTokensResponse": dict.fromkeys(
        ("prompt_tokens", "max_context_tokens", "model", "provider_id"),
        (COUNT("test_a_count_is_what_the_completion_costs"), REAL_COUNT("test_a_count_equals_the_prompt_tokens")),
    ),
}

Fields = set[tuple[str, str]]


def fields_from(roots: Iterable[Descriptor]) -> Fields:
    """The fields of these messages and of all that they can hold, as message and field; the values of their enums but zero.

    Only what is declared in the roots' package; a message without fields has nothing to show.
    """
    found: Fields = set()
    waiting = list(roots)
    package = waiting[0].file.package
    seen = {each.full_name for each in waiting}

    def name_of(each: Descriptor | EnumDescriptor) -> str:
        return each.full_name.removeprefix(f"{package}.")

    while waiting:
        message = waiting.pop()
        for field in message.fields:
            found.add((name_of(message), field.name))
            held = field.message_type
            if field.enum_type and name_of(field.enum_type) not in ELSEWHERE:
                found |= {(name_of(field.enum_type), value.name) for value in field.enum_type.values if value.number}
            if held and held.file.package == package and not held.GetOptions().map_entry and held.full_name not in seen:
                seen.add(held.full_name)
                waiting.append(held)
    return found


def rows() -> Iterator[tuple[str, Row]]:
    """Every row of both tables, with its field's name."""
    for title, table in (("TAKEN", TAKEN), ("GIVEN", GIVEN)):
        for message, fields in table.items():
            for field, row in fields.items():
                yield f"{title}: {message}.{field}", row


def named_by(cell: str | Accepted | NotShown) -> str | None:
    """The test that a cell names."""
    if isinstance(cell, NotShown):
        return None
    return cell.test if isinstance(cell, Accepted) else cell


def collected(files: Iterable[str]) -> set[str]:
    """The ids of all tests in these files; those with parameters also without."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = {line for line in done.stdout.splitlines() if "::" in line}
    return ids | {each.partition("[")[0] for each in ids}


@pytest.mark.parametrize(
    ("table", "roots"),
    [
        (TAKEN, [method.input_type for method in SERVICE.methods]),
        (GIVEN, [method.output_type for method in SERVICE.methods]),
    ],
    ids=["taken", "given"],
)
def test_every_field_has_a_row(table: Table, roots: list[Descriptor]) -> None:
    """And every row a field."""
    listed = {(message, field) for message, fields in table.items() for field in fields}
    expected = fields_from(roots)
    assert sorted(expected - listed) == [], "fields without a row"
    assert sorted(listed - expected) == [], "rows without a field"


def test_every_test_exists() -> None:
    """Under just this name, parameters included where a row names them."""
    named = {name: {test for test in map(named_by, row) if test} for name, row in rows()}
    there = collected(sorted({test.partition("::")[0] for tests in named.values() for test in tests}))
    assert {name: sorted(tests - there) for name, tests in named.items() if tests - there} == {}


def test_each_column_is_what_it_says() -> None:
    """Tests of the first column need no vLLM, those of the second one run on one; a missing test has a reason."""
    for name, (shown, real) in rows():
        first, second = named_by(shown), named_by(real)
        assert first is None or not first.startswith("tests/e2e/"), name
        assert second is None or second.startswith("tests/e2e/"), name
        assert all(cell.why for cell in (shown, real) if isinstance(cell, Accepted | NotShown)), name


def test_a_message_may_hold_itself() -> None:
    """It is listed once, with what it holds: this one holds messages that hold messages of their own kind."""
    found = fields_from([FileDescriptorProto.DESCRIPTOR])
    assert {("DescriptorProto", "nested_type"), ("EnumValueDescriptorProto", "number")} < found
    assert ("FieldDescriptorProto.Type", "TYPE_BOOL") in found
