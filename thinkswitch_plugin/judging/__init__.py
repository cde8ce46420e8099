"""lm-eval in its one set-up, how answers are graded, and paired statistics."""
