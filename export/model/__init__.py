"""The exportable Qwen3.5: config, operators, decoder, vision encoder, positions and tracing."""
