"""The ladder of checks L0–L3: metrics, gates with reasons, the fp32 reference, task accuracy, latency."""
