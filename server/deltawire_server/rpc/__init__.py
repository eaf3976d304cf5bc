"""The gRPC layer: only this folder, `processes.passing` and `lifecycle` depend on gRPC and protobuf.

The request flow, in the order of the modules:

    interceptors      every call: request id, authorization, drain, admission, errors to statuses, one log line
    caller            who the caller is: key, certificate, or what a trusted proxy asserts, which `forwarded` parses
    reception         receives the request, only after that; also serves health and reflection to callers without a key
    wire              refuses requests with too many fields or bytes before they are parsed
    chat_completion   the ChatCompletion service        model_registry   the ModelRegistry service
    validate          converts a request message to a validated value, or reports every invalid field
    convert           converts events to response messages
    status            converts an error to google.rpc.Status and trailers
"""
