"""Evaluation with lm-eval, grading of answers, and paired statistics."""
