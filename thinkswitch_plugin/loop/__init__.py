"""The work of each stage of an iteration."""
