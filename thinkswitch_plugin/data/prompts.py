"""Task prompts -> `requests.jsonl`, the OpenAI batch file that the thinking checkpoint answers.

{"custom_id": "p00007-s0", "method": "POST", "url": "/v1/chat/completions",
 "body": {"model": "...", "messages": [{"role": "user", "content": "7*3+4*2"}],
          "temperature": 0.0, "max_tokens": 64, "seed": 0,
          "metadata": {"prompt_id": "p00007", "trace": "opened", "convention": "think"}}}
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, StrictUndefined, Template, TemplateSyntaxError, Undefined, meta
from jinja2.sandbox import SandboxedEnvironment

from thinkswitch_plugin import files
from thinkswitch_plugin.args import PromptKeys, SamplingKeys, ThinkSwitchKeys, resolve_seed
from thinkswitch_plugin.data import batch, contamination, sources
from thinkswitch_plugin.data.traces import control_token
from thinkswitch_plugin.errors import ThinkSwitchError, first_line

QUESTION_FIELDS = ("prompt", "problem", "question")  # what a row's question is called


def read_prompts(keys: PromptKeys, seed: int) -> tuple[list[tuple[str, str]], str | None]:
    """Every prompt of the recipe's source as (id, text), and the hub commit if it came from there.

    A row's id is in the field `keys.id`; else the row number serves. Rows that `keys.outside` asks are left out.
    Raises `ThinkSwitchError` naming the file, row and field of a bad row.
    """
    rows, commit = _rows(keys, seed)
    template = _template(keys, StrictUndefined)
    seen: set[str] = set()
    found = []
    for where, number, row in rows:
        if fault := _fault_of_row(row, keys.id):
            raise ThinkSwitchError(f"{where}: {fault}.")
        try:
            text = template.render(row)
        except Exception as error:  # a template may compute anything with a row
            raise ThinkSwitchError(
                f"{where}: `thinkswitch.prompts.template` does not fit the row: {first_line(error)}."
            ) from None
        if not text.strip():
            raise ThinkSwitchError(f"{where}: the prompt is empty; fill it or delete the row.")
        if token := control_token(text):
            raise ThinkSwitchError(f"{where}: the prompt holds {token!r}, which would end the turn there; remove it.")
        prompt_id = id_of(keys, row, number)
        if prompt_id in seen:
            raise ThinkSwitchError(f"{where}: the id {prompt_id!r} occurs twice; give each row its own.")
        seen.add(prompt_id)
        found.append((prompt_id, text))
    if keys.outside:
        asked = contamination.evaluation_questions(keys.outside)
        held_out = {one.prompt_id for one in contamination.overlaps(found, asked)}
        found = [prompt for prompt in found if prompt[0] not in held_out]
    if keys.shuffle:
        random.Random(f"prompts-{seed}").shuffle(found)
    return found, commit


def made_with_pair(keys: ThinkSwitchKeys) -> bool:
    """Whether the prompts of a demo domain are made together with its pair, so that they need not be there yet."""
    cached = (keys.prompts.path or "").startswith(".cache/")
    return isinstance(keys.pair.demo, str) or (keys.pair.demo and cached)


def read_field(keys: PromptKeys, seed: int, field: str) -> dict[str, str]:
    """One field of every row of the recipe's source, such as its right answer, by prompt id.

    Raises `ThinkSwitchError` naming the row that does not have it.
    """
    found = {}
    for where, number, row in _rows(keys, seed)[0]:
        value = row.get(field)
        if field in row and (value is None or not str(value).strip()):
            raise ThinkSwitchError(f"{where}: the field `{field}` is empty; fill it.")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ThinkSwitchError(
                f"{where}: the field `{field}` is {'missing' if value is None else 'neither text nor a number'}; "
                f"fields of this row: {', '.join(row)}."
            )
        found[id_of(keys, row, number)] = str(value)
    return found


def id_of(keys: PromptKeys, row: dict[str, Any], number: int) -> str:
    """The id of a row of prompts: its own, else the number of the row, which counts from 1."""
    return str(row.get(keys.id, f"p{number - 1:05d}"))


def _template(keys: PromptKeys, undefined: type[Undefined]) -> Template:
    try:
        return SandboxedEnvironment(undefined=undefined).from_string(keys.template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise ThinkSwitchError(
            f"`thinkswitch.prompts.template` is not a Jinja template: {first_line(error)}."
        ) from None


def messages(keys: PromptKeys, text: str) -> list[dict[str, str]]:
    """The turns that ask one prompt."""
    system = [{"role": "system", "content": keys.system}] if keys.system else []
    return [*system, {"role": "user", "content": text}]


def request_body(model: str, turns: list[dict[str, Any]], sampling: SamplingKeys, seed: int) -> dict[str, Any]:
    """The body of one chat request with the recipe's sampling."""
    body: dict[str, Any] = {
        "model": model,
        "messages": turns,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
    }
    if sampling.temperature > 0:
        body |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    return body


def as_asked(keys: PromptKeys, question: str, others: Mapping[str, Any] | None = None) -> tuple[str, list[str]]:
    """A question of the user's own as the domain's template asks it, and the template's fields left empty.

    The question takes the place of the field that holds it in the domain's own rows; `others` are further fields.
    Raises `ThinkSwitchError` if the template has no such field or the question cannot be asked.
    """
    if not question.strip():
        raise ThinkSwitchError('there is no question; give one: make compare QUESTION="…".')
    if any("\ud800" <= c <= "\udfff" for c in question):
        raise ThinkSwitchError("the question holds bytes that are not UTF-8 text; write it in UTF-8.")
    if token := control_token(question):
        raise ThinkSwitchError(f"the question holds {token!r}, which would end the turn there; remove it.")
    template = _template(keys, ChainableUndefined)
    fields = meta.find_undeclared_variables(SandboxedEnvironment().parse(keys.template))
    field = next((name for name in QUESTION_FIELDS if name in fields), None)
    if field is None and len(fields) == 1:
        (field,) = fields
    if field is None:
        raise ThinkSwitchError(
            f"`thinkswitch.prompts.template` has no field for a question ({', '.join(sorted(fields)) or 'none at all'}); "
            f"name it {' or '.join(QUESTION_FIELDS)} in the recipe."
        )
    try:
        text = template.render({**(others or {}), field: question}).strip("\n")
    except Exception as error:  # a template may compute anything with a row
        raise ThinkSwitchError(
            f"`thinkswitch.prompts.template` cannot ask a question by itself: {first_line(error)}; "
            "it needs the other fields of the domain's rows."
        ) from None
    return text, sorted(fields - {field} - set(others or {}))


def _fault_of_row(row: dict[str, Any], id_field: str) -> str | None:
    for name, value in row.items():
        if isinstance(value, bytes):
            return f"`{name}` holds bytes that are not UTF-8 text; save the file as UTF-8"
    for name in QUESTION_FIELDS:
        if not isinstance(row.get(name, ""), str):
            return f"`{name}` must be text, found {type(row[name]).__name__}"
    value = row.get(id_field, "-")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return f"`{id_field}` must be text or a whole number, found {str(value)[:50]!r}; leave it out to count the rows"
    return None


def _rows(keys: PromptKeys, seed: int) -> tuple[Iterator[tuple[str, int, dict[str, Any]]], str | None]:
    commit = None
    if keys.path is not None:
        path = Path(resolve_seed(keys.path, seed))
        unit = "line" if path.suffix == ".jsonl" else "row"
        rows = ((f"{path}, {unit} {number}", number, row) for number, row in sources.read_file(path))
    else:
        dataset, commit = sources.load_hub(str(keys.hub), keys.config, keys.split, keys.revision)
        rows = ((f"{keys.hub}, row {number}", number, row) for number, row in enumerate(dataset, 1))
    return rows, commit


def prompts_of_iteration(keys: PromptKeys, seed: int, iteration: int) -> tuple[list[tuple[str, str]], str | None]:
    """The prompts that iteration 1, 2, … asks (the first `count`, or the next ones if `fresh`), and the hub commit.

    Raises `ThinkSwitchError` if the source is too small.
    """
    start = (iteration - 1) * keys.count if keys.fresh else 0
    every, commit = read_prompts(keys, seed)
    chosen = every[start : start + keys.count]
    if len(chosen) < keys.count:
        source = keys.hub or resolve_seed(keys.path or "", seed)
        raise ThinkSwitchError(
            f"{source} has only {len(every)} prompts; iteration {iteration} needs {start + keys.count}: "
            "add prompts, lower `thinkswitch.prompts.count`, or set `fresh: false`."
        )
    return chosen, commit


def write_requests(
    out: Path,
    asked: Iterable[tuple[str, list[dict[str, Any]]]],
    *,
    model: str,
    how: batch.Asked,
    sampling: SamplingKeys,
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Write one request for every prompt and sample; return how many.

    Args:
        asked: id and turns of every prompt.
        model: the name under which the checkpoint is served.
        how: how it is asked and its completions are read; each request keeps it.
        seed: run seed; sample j of every prompt is seeded with ``seed * samples + j``.
        more: fields that every body has besides, such as `stop`.
    """
    count = 0
    with files.atomic_file(out) as handle:
        for (prompt_id, turns), sample in itertools.product(asked, range(sampling.samples)):
            body = request_body(model, turns, sampling, seed * sampling.samples + sample)
            body |= {**(more or {}), **how.fields(prompt_id=prompt_id)}
            handle.write(files.dumps_line(batch.request(f"{prompt_id}-s{sample}", body)))
            count += 1
    return count


def ask_in_mode(
    out: Path,
    asked: Iterable[tuple[str, str]],
    checkpoint: str,
    mode: str,
    keys: ThinkSwitchKeys,
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Write the requests that ask a checkpoint prompts as its recipe does; return how many.

    Args:
        asked: id and text of every prompt.
        mode: `instruct` or `thinking`; only the latter writes its traces as the recipe says.
        more: as for `write_requests`.
    """
    from transformers import AutoTokenizer

    convention = keys.convention if mode == "thinking" else None
    how = batch.asked_of(AutoTokenizer.from_pretrained(checkpoint), convention, keys.pair.arguments(mode))
    turns = ((prompt_id, messages(keys.prompts, text)) for prompt_id, text in asked)
    return write_requests(out, turns, model=checkpoint, how=how, sampling=keys.sampling, seed=seed, more=more)
