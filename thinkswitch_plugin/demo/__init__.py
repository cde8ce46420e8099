"""The demo domains: a task, a tokenizer and a tiny pair made from scratch, and a mixed variant of the task.

It exists so that the whole method can be watched, tested and broken on a machine
with two cores and no network. Like the paper's 15 prompts, distillation here
*elicits* a skill that the common base already has; it teaches nothing new.
"""
