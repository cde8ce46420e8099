"""The switch: a small classifier that sends a question to instruct or to thinking."""
