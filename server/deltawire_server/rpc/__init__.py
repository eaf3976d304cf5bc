"""The gRPC side: the only folder, with `lifecycle`, that knows gRPC and protobuf.

A call's way through it, in the order of the files one needs to read:

    interceptors      every call: request id, who calls, drain, admission, failure to status, one log line
    reception         its request, received only then; health and reflection are what callers without a key reach
    wire              bytes in, refused if they hold too much to be parsed
    chat_completion   the ChatCompletion service        model_registry   the ModelRegistry service
    validate          a request message in, a checked value out, or every violated field
    convert           events in, response messages out
    status            a failure in, google.rpc.Status and trailers out
"""
