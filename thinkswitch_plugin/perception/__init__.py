"""Adaptive thinking: formats that say first whether a trace comes before the answer, and what is built on them.

The method is that of arXiv 2404.09170.
"""
