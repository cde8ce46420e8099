"""Task prompts -> `requests.jsonl`, the OpenAI batch file that the thinking checkpoint answers.

{"custom_id": "p00007-s0", "method": "POST", "url": "/v1/chat/completions",
 "body": {"model": "...", "messages": [{"role": "user", "content": "7*3+4*2"}],
          "temperature": 0.0, "max_tokens": 64, "seed": 0,
          "metadata": {"prompt_id": "p00007", "trace": "opened"}}}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.args import PromptKeys, SamplingKeys, resolve_seed
from thinkswitch_plugin.errors import ThinkSwitchError


def read_prompts(keys: PromptKeys, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (id, prompt text) from the recipe's source, in its order.

    A row may name its own `id`; else the row number serves.
    Raises `ThinkSwitchError` naming the file, line and field of a bad row.
    """
    seen: set[str] = set()
    for where, number, row in _rows(keys, seed):
        text = row.get(keys.field)
        if not isinstance(text, str) or not text.strip():
            raise ThinkSwitchError(f"{where}: `{keys.field}` is missing, empty or not text.")
        prompt_id = str(row.get("id", f"p{number - 1:05d}"))
        if prompt_id in seen:
            raise ThinkSwitchError(f"{where}: the id {prompt_id!r} occurs twice.")
        seen.add(prompt_id)
        yield prompt_id, text


def _rows(keys: PromptKeys, seed: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if keys.path is not None:
        path = Path(resolve_seed(keys.path, seed))
        for number, row in files.read_jsonl(path):
            yield f"{path}, line {number}", number, row
        return
    from datasets import load_dataset

    assert keys.hub is not None
    dataset = load_dataset(keys.hub, keys.config, split=keys.split, revision=keys.revision)
    for number, row in enumerate(dataset.shuffle(seed=seed), 1):
        yield f"{keys.hub}, row {number}", number, row


def prompts_of_iteration(keys: PromptKeys, seed: int, iteration: int) -> list[tuple[str, str]]:
    """The prompts that iteration 1, 2, … asks: the first `count`, or the next ones if `fresh`.

    Raises `ThinkSwitchError` if the source is too small.
    """
    start = (iteration - 1) * keys.count if keys.fresh else 0
    chosen = list(itertools.islice(read_prompts(keys, seed), start, start + keys.count))
    if len(chosen) < keys.count:
        source = keys.hub or resolve_seed(keys.path or "", seed)
        raise ThinkSwitchError(
            f"{source} has only {start + len(chosen)} prompts; iteration {iteration} needs {start + keys.count}: "
            "add prompts, lower `thinkswitch.prompts.count`, or set `fresh: false`."
        )
    return chosen


def write_requests(
    out: Path,
    prompts: list[tuple[str, str]],
    *,
    model: str,
    opened: bool,
    keys: PromptKeys,
    sampling: SamplingKeys,
    seed: int,
) -> int:
    """Write one request for every prompt and sample; return how many.

    Args:
        prompts: (id, text) of every prompt.
        model: the name under which the thinking checkpoint is served.
        opened: whether its chat template opens the trace.
        seed: run seed; sample j of every prompt is seeded with ``seed * samples + j``.
    """
    written = 0
    with files.atomic_file(out) as handle:
        for prompt_id, text in prompts:
            messages = [{"role": "system", "content": keys.system}] if keys.system else []
            messages.append({"role": "user", "content": keys.template.replace("{prompt}", text)})
            for sample in range(sampling.samples):
                body: dict[str, Any] = {
                    "model": model,
                    "messages": messages,
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_tokens,
                    "seed": seed * sampling.samples + sample,
                }
                if sampling.temperature > 0:
                    body |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
                body["metadata"] = {"prompt_id": prompt_id, "trace": "opened" if opened else "inline"}
                handle.write(
                    files.dumps_line(
                        {
                            "custom_id": f"{prompt_id}-s{sample}",
                            "method": "POST",
                            "url": "/v1/chat/completions",
                            "body": body,
                        }
                    )
                )
                written += 1
    return written
