"""Ask a checkpoint: a vLLM started here, a server of the user's own, or transformers in process."""
