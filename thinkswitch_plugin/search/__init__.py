"""Sweeps over λ, selective merges and baselines: a pair, its candidates, lm-eval as the judge, the tables."""
