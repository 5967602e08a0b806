"""The host's side of the contract: prompts and pictures in, tokens out, on any session."""
