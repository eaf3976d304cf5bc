"""The part of vLLM 0.32's `/openapi.json` about chat requests: the names of the supported fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

CHAT_FIELDS = (
    *("messages", "model", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens"),
    *("max_completion_tokens", "n", "presence_penalty", "response_format", "seed", "stop", "stream", "stream_options"),
    *("temperature", "top_p", "tools", "tool_choice", "reasoning_effort", "thinking_token_budget", "include_reasoning"),
    *("parallel_tool_calls", "user", "use_beam_search", "top_k", "min_p", "repetition_penalty", "watermarking"),
    *("length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side"),
    *("prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "bad_words", "echo", "add_generation_prompt"),
    *("continue_final_message", "add_special_tokens", "documents", "chat_template", "chat_template_kwargs"),
    *("media_io_kwargs", "mm_processor_kwargs", "structured_outputs", "priority", "request_id", "session_id"),
    *("return_tokens_as_token_ids", "return_token_ids", "routed_experts_prompt_start", "return_token_offsets"),
    *("return_prompt_text", "mm_payload", "return_mm_kwargs", "cache_salt", "kv_transfer_params", "ec_transfer_params"),
    *("vllm_xargs", "repetition_detection", "stream_interval"),
)
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def openapi(version: str, without: Collection[str] = ()) -> dict[str, Any]:
    """Build the document, with references in the same places as vLLM's.

    Args:
        version: The version of vLLM.
        without: Fields of a chat request, or of a tool's function, to leave out.
    """

    def described(names: Collection[str], **schemas: dict[str, Any]) -> dict[str, Any]:
        properties = {name: schemas.get(name, {"title": name}) for name in names if name not in without}
        return {"type": "object", "additionalProperties": True, "properties": properties}

    tools = {"anyOf": [{"type": "array", "items": _reference("ChatCompletionToolsParam")}, {"type": "null"}]}
    content = {"application/json": {"schema": _reference("ChatCompletionRequest")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "FastAPI", "version": version},
        "paths": {"/v1/chat/completions": {"post": {"requestBody": {"content": content, "required": True}}}},
        "components": {
            "schemas": {
                "ChatCompletionRequest": described(CHAT_FIELDS, tools=tools),
                "ChatCompletionToolsParam": described(("type", "function"), function=_reference("FunctionDefinition")),
                "FunctionDefinition": described(FUNCTION_FIELDS),
            }
        },
    }


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
