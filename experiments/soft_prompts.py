"""Look at the soft prompts of a model with a perception module, and swap them between questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.checkpoint import MODULE, PLACEHOLDER

Replace = Callable[[Tensor], Tensor | None]


@contextmanager
def replaced_prompts(model: Any, replace: Replace) -> Iterator[None]:
    """Put other soft prompts in the places of a model's own while the block runs.

    Args:
        model: one that has a perception module, under peft or not.
        replace: from the prompts of a batch, (questions, tokens, hidden) in the order of its
            rows, to others of that shape, such as `prompts_of_others`; None leaves them.
    """
    hook = getattr(model, MODULE).register_forward_hook(lambda _module, _inputs, prompts: replace(prompts))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def soft_prompts(model: Any, ids: Tensor) -> Tensor:
    """The soft prompts of rendered prompts `ids`, (rows, length): (questions, tokens, hidden)."""
    found: list[Tensor] = []
    model.soft_prompt.put()
    with replaced_prompts(model, found.append):
        model.get_input_embeddings()(ids)
    if not found:
        raise ThinkSwitchError(f"No text holds {PLACEHOLDER}; render it by the checkpoint's own chat template.")
    return found[0]


def prompts_of_others(pool: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """For `replaced_prompts`: every question gets the soft prompt of another one, drawn at random.

    Whatever lies in the same batch does not matter: batches are sorted by length and text, and a neighbour's prompt
    would be that of the most similar question.

    Args:
        pool: the soft prompts of all questions, (questions, tokens, hidden), as `soft_prompts` gives them.
    """
    if len(pool) < 2:
        raise ThinkSwitchError("Soft prompts can be swapped among two questions or more; raise `evaluation.limit`.")
    generator = torch.Generator().manual_seed(seed)

    def replace(prompts: Tensor) -> Tensor:
        own = torch.cdist(prompts.flatten(1).float(), pool.flatten(1).float()).argmin(1)
        steps = torch.randint(1, len(pool), (len(prompts),), generator=generator)
        return pool[(own + steps.to(own.device)) % len(pool)]

    return replace
