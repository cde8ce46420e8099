"""Interpolating two checkpoints: the kernel, the check of the pair, its similarity, the rebuild."""
