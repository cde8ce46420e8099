"""The question sets of the lm-eval tasks: what a row must hold, and how rows of GPQA and IFEval become questions."""

# No postponed annotations: pydantic evaluates them.
import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field, StrictInt, StringConstraints, ValidationError

from thinkswitch_plugin.errors import ThinkSwitchError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class AimeRow(BaseModel):
    """What the AIME tasks read of a row."""

    problem: Text
    answer: StrictInt | Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[+-]?\d+(\^\\circ)?$")]


class PubMedQAContext(BaseModel):
    """The paragraphs of an abstract."""

    contexts: Annotated[list[Text], Field(min_length=1)]


class PubMedQARow(BaseModel):
    """What the PubMedQA tasks read of a row."""

    pubid: StrictInt | Text
    question: Text
    context: PubMedQAContext
    final_decision: Literal["yes", "no", "maybe"]


class GpqaRow(BaseModel):
    """What the GPQA task reads of a row."""

    question: Text = Field(alias="Question")
    right: Text = Field(alias="Correct Answer")
    wrong_1: Text = Field(alias="Incorrect Answer 1")
    wrong_2: Text = Field(alias="Incorrect Answer 2")
    wrong_3: Text = Field(alias="Incorrect Answer 3")


class IfevalRow(BaseModel):
    """What the IFEval task reads of a row."""

    prompt: Text
    instruction_id_list: Annotated[list[Text], Field(min_length=1)]
    kwargs: list[dict[str, Any]]


def check_rows(rows: Iterable[tuple[str, dict[str, Any]]], source: str, shape: type[BaseModel], name: str) -> None:
    """Raise `ThinkSwitchError` for the first row that cannot be asked and graded, for a question twice, or for no row.

    Args:
        rows: (its place in the source, row).
        shape: what every row must hold.
        name: the column that tells one question from another.
    """
    seen: dict[str, str] = {}
    for where, row in rows:
        try:
            shape.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"][:2] if part not in ("int", "str"))
            reason = "is missing" if first["type"] == "missing" else f"cannot be used ({first['msg']})"
            raise ThinkSwitchError(f"{where}: `{at}` {reason}; the file needs the columns of the hub's set.") from None
        before = seen.setdefault(str(row[name]), where)
        if before != where:
            raise ThinkSwitchError(f"{where}: the same `{name}` as in {before.rpartition(', ')[2]}; remove one.")
    if not seen:
        raise ThinkSwitchError(f"{source} holds no rows.")


def gpqa_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a question with four `choices` and the letter of the right one as `answer`.

    The order of the choices is that of their hashes: the same in every evaluation, and blind to which one is right.
    """
    read = GpqaRow.model_validate(row)
    every = [read.right, read.wrong_1, read.wrong_2, read.wrong_3]
    choices = sorted(every, key=lambda text: hashlib.sha256(f"{read.question}\n{text}".encode()).hexdigest())
    return {"question": read.question, "choices": choices, "answer": "ABCD"[choices.index(read.right)]}


def ifeval_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a question; its `answer` is what `follows` needs to check a completion, as JSON."""
    read = IfevalRow.model_validate(row)
    # The hub's rows hold every argument of every instruction, null where it is not used.
    arguments = [{name: value for name, value in one.items() if value is not None} for one in read.kwargs]
    needed = {"prompt": read.prompt, "instruction_id_list": read.instruction_id_list, "kwargs": arguments}
    return {"prompt": read.prompt, "answer": orjson.dumps(needed).decode()}


def instructions(text: str) -> str | None:
    """The instructions of an IFEval question in their normal form, None if the text is not `ifeval_question`'s."""
    try:
        read = IfevalRow.model_validate_json(text)
    except ValidationError:
        return None
    return text if len(read.kwargs) == len(read.instruction_id_list) else None


def follows(text: str, wanted: str) -> bool:
    """Whether a text follows every instruction, strictly, by lm-eval's own checks.

    Args:
        wanted: the `answer` of an `ifeval_question`.
    """
    from lm_eval.tasks.ifeval.utils import process_results

    return bool(process_results({"key": 0, **orjson.loads(wanted)}, [text])["prompt_level_strict_acc"])


def require_checkable(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise `ThinkSwitchError` if lm-eval cannot check the instructions of IFEval rows, before anything is generated.

    Args:
        rows: (its place in the source, row).
    """
    try:
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ThinkSwitchError(f"IFEval needs {error.name}: pip install 'lm_eval[ifeval]'.") from None
    named = set()
    for where, row in rows:
        if unknown := next((name for name in row["instruction_id_list"] if name not in INSTRUCTION_DICT), None):
            raise ThinkSwitchError(
                f"{where}: lm-eval does not know the instruction {unknown!r}; correct it or remove the row."
            )
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise ThinkSwitchError(f"{where}: `kwargs` must have one entry for each of `instruction_id_list`.")
        named |= set(row["instruction_id_list"])
    if named & {"length_constraints:number_sentences", "change_case:capital_word_frequency"}:
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise ThinkSwitchError(
                "IFEval needs NLTK's sentence tokenizer: run `python -m nltk.downloader punkt_tab`."
            ) from None
