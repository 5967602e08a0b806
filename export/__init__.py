"""Mobile export and compilation pipeline for Qwen3.5. It knows the model and nothing of any runtime."""
