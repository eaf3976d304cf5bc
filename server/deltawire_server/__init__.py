"""The gateway: gRPC on one side, vLLM's HTTP API on the other."""
