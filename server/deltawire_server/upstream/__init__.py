"""The providers: HTTP clients of vLLM. Only this package imports httpx; it imports neither gRPC nor protobuf."""
