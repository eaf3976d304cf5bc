"""Typed, streaming access over gRPC to chat models served by vLLM."""
