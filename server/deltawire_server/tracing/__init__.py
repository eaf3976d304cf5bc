"""Traces: a span for each call and for each attempt at a replica, exported with OpenTelemetry.

    tracer     the interface: `tracer.current` starts spans; by default it records nothing
    exporting  makes it record, as the standard OTEL_ variables say
    otel       records with OpenTelemetry's SDK; the only module that imports it, and only if traces are exported

A span's parent is passed on as W3C Trace Context, in `CallContext`: from the caller to the call's span, from there to the spans of
attempts, to other workers, and to vLLM. Spans never have content: neither messages nor tools, nor errors, which may quote them.

May use: telemetry and the modules beside it.
"""
