"""The vLLM engine: an adapter on `AsyncLLM`."""
