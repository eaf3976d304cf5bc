"""Who generates: providers, spoken to over HTTP. The only folder that knows httpx, and it knows neither gRPC nor protobuf."""
