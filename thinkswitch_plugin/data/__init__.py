"""Text in, text out: traces, answers, batch files, prompts, pairs, contamination. No models, servers or run folders."""
