"""Sweeps over λ, selective merges and baselines: a pair, its candidates, their evaluation with lm-eval, and the tables."""
