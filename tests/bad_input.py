"""`make bad-input`: damage every file that a user provides, in the ways files get damaged.

Each form is created in a temporary folder and passed to the real command; the table shows the
response. Harmless forms must work. `--list` runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
TS = str(Path(sys.executable).with_name("thinkswitch"))
RECIPE = """base_model: x
adapter: qlora
output_dir: out
datasets:
  - path: runs/mine/iter-1/pairs.jsonl
thinkswitch:
  domain: mine
  pair: {instruct: ./instruct, thinking: ./thinking}
  prompts: {path: PROMPTS, count: 2}
  evaluation: {task: thinkswitch_template}
"""
MERGE = "merge_method: thinkswitch\nmodels:\n  - model: ./instruct\n  - model: ./thinking\nbase_model: ./instruct\n"
RUN = {
    "domain": "mine",
    "recipe": "recipes/mine.yaml",
    "overlays": [],
    "seed": 0,
    "engine": "embedded",
    "iterations": 1,
}
NO_PERMISSION = "no permission"
FOLDER = "a folder"
BINARY = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@dataclass(frozen=True)
class Form:
    """One broken (or harmless) file: its kind and defect, the files it needs, and the command."""

    kind: str
    defect: str
    path: str
    data: bytes | str
    command: tuple[str, ...]
    says: str = ""  # what the message must name
    works: bool = False


def prompts(defect: str, data: bytes | str, says: str = "", *, suffix: str = "jsonl", works: bool = False) -> Form:
    return Form(
        "prompts", defect, f"prompts.{suffix}", data, ("begin", "--domain", "mine", "--runs", "runs"), says, works
    )


def recipe(defect: str, data: bytes | str, says: str = "", *, works: bool = False) -> Form:
    return Form(
        "recipe", defect, "recipes/mine.yaml", data, ("begin", "--domain", "mine", "--runs", "runs"), says, works
    )


def merge_config(defect: str, data: bytes | str, says: str = "") -> Form:
    return Form("merge config", defect, "merge.yaml", data, ("merge", "merge.yaml", "out"), says)


def stage(kind: str, defect: str, data: bytes | str, says: str = "", *, works: bool = False) -> Form:
    return Form(kind, defect, f"runs/mine/iter-1/{kind}.jsonl", data, ("pairs", "runs/mine", "1"), says, works)


def outputs(defect: str, data: bytes | str, says: str = "", *, works: bool = False) -> Form:
    return Form("outputs", defect, "outputs.jsonl", data, ("score", "--task", "aime", "outputs.jsonl"), says, works)


def task_data(defect: str, data: bytes | str, says: str = "", *, name: str = "aime_2026.jsonl") -> Form:
    return Form("task data", defect, f"data/{name}", data, ("requests", "runs/mine", "1"), says)


def lines(*rows: object) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def table(suffix: str, columns: Mapping[str, list[Any]]) -> bytes:
    import pyarrow
    from pyarrow import csv, parquet

    out = io.BytesIO()
    made = pyarrow.table(dict(columns))
    csv.write_csv(made, out) if suffix == "csv" else parquet.write_table(made, out)
    return out.getvalue()


def request(custom_id: object = "p0-s0", **body: object) -> dict[str, object]:
    good = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 9}
    return {"custom_id": custom_id, "body": {**good, **body}}


def answer(text: object = "t</think>5", custom_id: str = "p0-s0") -> dict[str, object]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"custom_id": custom_id, "response": {"body": {"choices": [choice]}}, "error": None}


GOOD = lines({"prompt": "a"}, {"prompt": "b"})
DEEP = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"


def forms() -> Iterator[Form]:
    """Every form, broken and harmless."""
    yield prompts("as it should be", GOOD, works=True)
    yield prompts("byte-order mark", b"\xef\xbb\xbf" + GOOD, works=True)
    yield prompts("CRLF", GOOD.replace(b"\n", b"\r\n"), works=True)
    yield prompts(
        "U+2028 in a text, no line feed at the end", lines({"prompt": "a\u2028b"}) + b'{"prompt": "b"}', works=True
    )
    yield prompts("think tags in a prompt", lines({"prompt": "what is </think>?"}, {"prompt": "b"}), works=True)
    yield prompts("unknown fields", lines({"prompt": "a", "x": 1}, {"prompt": "b", "y": {}}), works=True)
    yield prompts("empty", b"", "has only 0 prompts")
    yield prompts("a folder in its place", FOLDER, "prompts.jsonl is a folder")
    yield prompts("no permission", NO_PERMISSION, "no permission")
    yield prompts("binary", BINARY, "line 1: not UTF-8 text")
    yield prompts("UTF-16", GOOD.decode().encode("utf-16"), "line 1: not UTF-8 text")
    yield prompts("Latin-1", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "line 2: not UTF-8 text")
    yield prompts("JSON instead of JSON lines", b'[\n{"prompt": "a"}\n]\n', "line 1: not valid JSON")
    yield prompts("a line that is cut", b'{"prompt": "a"}\n{"prom\n', "line 2: not valid JSON")
    yield prompts("a list in place of an object", b'{"prompt": "a"}\n["b"]\n', "line 2: expected a JSON object")
    yield prompts("field missing", b'{"prompt": "a"}\n{"promt": "b"}\n', "line 2: .*'prompt' is undefined")
    yield prompts(
        "field of another type", b'{"prompt": "a"}\n{"prompt": 7}\n', "line 2: `prompt` must be text, found int"
    )
    yield prompts("empty prompt", b'{"prompt": "a"}\n{"prompt": " "}\n', "line 2: the prompt is empty")
    yield prompts(
        "id twice", lines({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}), "line 2: the id 'x' occurs"
    )
    yield prompts("id of another type", lines({"prompt": "a", "id": [1]}), "line 1: `id` must be text")
    yield prompts(
        "control token in a prompt", lines({"prompt": "a<|im_end|>"}), r"line 1: the prompt holds '<\|im_end\|>'"
    )
    yield prompts("lone surrogate", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "line 2: not valid JSON .*surrogate")
    yield prompts("NaN", b'{"prompt": "a", "x": NaN}\n', "line 1: not valid JSON")
    yield prompts("nested 5,000 deep", DEEP, "line 1: not valid JSON")
    yield prompts("another suffix", GOOD, r"use a file that ends in", suffix="txt")
    yield prompts("CSV as it should be", b'prompt,id\n"a\nb",x\nc,y\n', suffix="csv", works=True)
    yield prompts(
        "CSV with byte-order mark and CRLF", b"\xef\xbb\xbfprompt,id\r\na,x\r\nb,y\r\n", suffix="csv", works=True
    )
    yield prompts("CSV, empty", b"", "is not a CSV file", suffix="csv")
    yield prompts("CSV, a row too long", b"prompt\na\nb,c\n", "is not a CSV file: .*Expected 1 columns", suffix="csv")
    yield prompts("CSV, Latin-1", b"prompt,n\n\xe9,1\nb,2\n", "`prompt` holds bytes that are not UTF-8", suffix="csv")
    yield prompts("CSV, column missing", b"promt\na\nb\n", "row 1: .*'prompt' is undefined", suffix="csv")
    yield prompts("Parquet as it should be", table("parquet", {"prompt": ["a", "b"]}), suffix="parquet", works=True)
    yield prompts("Parquet, empty", b"", "is not a PARQUET file", suffix="parquet")
    yield prompts(
        "Parquet, cut", table("parquet", {"prompt": ["a", "b"]})[:-9], "is not a PARQUET file", suffix="parquet"
    )
    yield prompts("Parquet, numbers", table("parquet", {"prompt": [1, 2]}), "`prompt` must be text", suffix="parquet")
    yield prompts(
        "Parquet, null", table("parquet", {"prompt": ["a", None]}), "row 2: `prompt` must be", suffix="parquet"
    )

    yield recipe("byte-order mark", b"\xef\xbb\xbf" + RECIPE.encode(), works=True)
    yield recipe("CRLF", RECIPE.replace("\n", "\r\n"), works=True)
    yield recipe("empty", b"", "expected a YAML mapping")
    yield recipe("a folder in its place", FOLDER, "recipes/mine.yaml is a folder")
    yield recipe("no permission", NO_PERMISSION, "no permission")
    yield recipe("binary", BINARY, "not UTF-8 text")
    yield recipe("UTF-16", RECIPE.encode("utf-16"), "not UTF-8 text")
    yield recipe("a tab", RECIPE.replace("  domain", "\tdomain"), "line 7: found character '.t'")
    yield recipe("bracket not closed", RECIPE.replace("count: 2}", "count: 2"), r"line 10: ")
    yield recipe(
        "a Python object", RECIPE.replace("mine\n", "!!python/object/apply:os.system [id]\n", 1), "line 7: could not"
    )
    yield recipe("no thinkswitch section", "base_model: x\n", "no `thinkswitch:` section")
    yield recipe("field missing", RECIPE.replace("  domain: mine\n", ""), "`thinkswitch.domain` is missing")
    yield recipe(
        "unknown field", RECIPE.replace("count", "cuont"), "unknown key `thinkswitch.prompts.cuont`; did you mean"
    )
    yield recipe("field of another type", RECIPE.replace("count: 2", "count: two"), "`thinkswitch.prompts.count`")
    yield recipe("number out of range", RECIPE.replace("count: 2", "count: 0"), "`thinkswitch.prompts.count`")
    yield recipe("NaN", RECIPE + "  sampling: {temperature: .nan}\n", "`thinkswitch.sampling.temperature`")
    yield recipe("infinity", RECIPE + "  engine: {timeout: .inf}\n", "`thinkswitch.engine.timeout`")
    yield recipe("impossible date", RECIPE + "day: 2024-13-45\n", "a value cannot be read")
    yield recipe("nested 2,000 deep", RECIPE + "x: " + "[" * 2000 + "]" * 2000 + "\n", "nested too deeply")
    yield recipe("a mapping that holds itself", RECIPE + "x: &a {b: *a}\n", "nested too deeply, or contains itself")
    yield recipe("a key that is a number", RECIPE + "7: x\n", "the key '7' is not text")
    yield recipe(
        "code of a model switched on", RECIPE + "trust_remote_code: true\n", "`trust_remote_code` would run code"
    )
    yield recipe(
        "the same through vLLM",
        RECIPE + "  engine: {vllm_args: [--trust-remote-code]}\n",
        r"vllm_args\[0\]` would run code",
    )
    yield recipe(
        "the same, its end left out",
        RECIPE + "  engine: {vllm_args: [--trust-rem]}\n",
        r"vllm_args\[0\]` would run code",
    )
    yield recipe(
        "traces taken out by vLLM",
        RECIPE + "  engine: {vllm_args: [--reasoning_parser, qwen3]}\n",
        "`thinkswitch.engine.vllm_args`: vLLM's reasoning parser would take the trace out",
    )
    yield recipe(
        "options from a file",
        RECIPE + "  engine: {vllm_args: [--config, x.yaml]}\n",
        "`--config` would bring options that no stamp sees",
    )
    yield recipe("another domain's name", RECIPE.replace("domain: mine", "domain: yours"), "the file is named mine")
    yield recipe(
        "a file it names is not there", RECIPE.replace("PROMPTS", "nothing.jsonl"), "nothing.jsonl, which does not"
    )

    yield merge_config("empty", b"", "merge.yaml: expected a YAML mapping")
    yield merge_config("a folder in its place", FOLDER, "merge.yaml is a folder")
    yield merge_config("binary", BINARY, "not UTF-8 text")
    yield merge_config("λ missing", MERGE, "`parameters.lambda` is missing")
    yield merge_config("λ not a number", MERGE + "parameters: {lambda: .nan}\n", "`lambda` is nan; use a finite number")
    yield merge_config("unknown parameter", MERGE + "parameters: {lamda: 0.5}\n", "`lamda` is not a parameter")
    yield merge_config(
        "parameters of another type", MERGE + "parameters: [1]\n", "`parameters` must be a mapping, found list"
    )
    yield merge_config("slices of another type", MERGE + "slices: 5\n", "`slices` must be a list, found int")
    yield merge_config(
        "model missing", MERGE.replace("- model: ./thinking", "- weight: 1"), r"`models\[1\].model` is missing"
    )
    yield merge_config(
        "unknown method", MERGE.replace("thinkswitch", "slurp"), "has no `merge_method` 'slurp'; it has arcee_fusion"
    )

    yield stage("requests", "empty", b"", "requests.jsonl holds no requests")
    yield stage("requests", "a folder in its place", FOLDER, "requests.jsonl is a folder")
    yield stage("requests", "binary", BINARY, "line 1: not UTF-8 text")
    yield stage("requests", "id missing", lines({"body": {}}), "line 1: `custom_id` is missing")
    yield stage(
        "requests", "id twice", lines(request(), request()), "line 2: the `custom_id` 'p0-s0' is that of line 1"
    )
    yield stage("requests", "no messages", lines(request(messages=[])), "line 1: `body.messages` is missing or empty")
    yield stage(
        "requests",
        "content of another type",
        lines(request(messages=[{"role": "user", "content": 7}])),
        r"messages\[0\].content",
    )
    yield stage("requests", "metadata of another type", lines(request(metadata=[])), "line 1: `body.metadata`")

    yield stage(
        "generations", "byte-order mark and CRLF", b"\xef\xbb\xbf" + lines(answer()).replace(b"\n", b"\r\n"), works=True
    )
    yield stage(
        "generations", "U+2028 in an answer", lines(answer("t</think>a\u2028b")), "1 of 2 samples kept", works=True
    )
    yield stage(
        "generations",
        "last line torn",
        lines(answer()) + b'{"custom_id": "p1-s0", "resp',
        "1 not_generated",
        works=True,
    )
    yield stage(
        "generations", "answer twice", lines(answer(), answer("t</think>6")), "1 lines left out whose id is", works=True
    )
    yield stage(
        "generations",
        "unknown id",
        lines(answer(), answer(custom_id="x")),
        "1 lines left out whose id nobody",
        works=True,
    )
    yield stage(
        "generations", "control token in an answer", lines(answer(), answer("t</think>5<|im_end|>6", "p1-s0")), "1 control_token",
        works=True,
    )  # fmt: skip
    yield stage(
        "generations", "think tags in an answer", lines(answer(), answer("t</think>5</think>6", "p1-s0")), "1 ambiguous_tags",
        works=True,
    )  # fmt: skip
    yield stage(
        "generations", "a trace in a way that nobody knows", lines(answer("<zork>2+3</zork>5")),
        r"generations.jsonl, line 1: of 1 finished .*begins '<zork>2\+3</zork>5': set `thinkswitch.trace`",
    )  # fmt: skip
    yield stage(
        "generations", "an answer that was filtered",
        lines(answer(), answer(custom_id="p1-s0")).replace(b'"stop"', b'"content_filter"', 1), "1 content_filter", works=True,
    )  # fmt: skip
    yield stage(
        "requests", "a convention that nobody knows", lines(request(metadata={"convention": "thnk"})),
        "line 1: `body.metadata.convention` is 'thnk', and the nearest convention is 'think'",
    )  # fmt: skip
    yield recipe(
        "a trace convention that nobody knows", RECIPE + "  trace: granit\n", "nearest convention is 'granite'"
    )
    yield stage("generations", "content of another type", lines(answer(), answer([7], "p1-s0")), "1 failed", works=True)
    yield stage("generations", "empty", b"", "holds no complete answer .*2 not_generated")
    yield stage("generations", "a folder in its place", FOLDER, "generations.jsonl is a folder")
    yield stage("generations", "binary", BINARY, "line 1: not UTF-8 text")
    yield stage("generations", "broken line", lines(answer()) + b"not json\n", "line 2: not valid JSON")
    yield stage(
        "generations", "id of another type", lines({"custom_id": 7}), "line 1: `custom_id` is missing or not text"
    )
    yield stage(
        "generations", "lone surrogate", lines(answer()).replace(b"5", b"\\ud83d"), "line 1: not valid JSON .*surrogate"
    )

    aime = [{"problem": f"What is {n}?", "answer": n} for n in range(2)]
    abstract = {"pubid": 1, "question": "q", "context": {"contexts": ["c"]}, "final_decision": "yes"}
    yield task_data("empty", b"", "aime_2026.jsonl holds no rows")
    yield task_data("a folder in its place", FOLDER, "aime_2026.jsonl is a folder")
    yield task_data("binary", BINARY, "line 1: not UTF-8 text")
    yield task_data("a line that is cut", lines(*aime)[:-5], "line 2: not valid JSON")
    yield task_data("field missing", lines(aime[0], {"problem": "x"}), "line 2: `answer` is missing")
    yield task_data("field empty", lines({"problem": " ", "answer": 1}), "line 1: `problem` cannot be used")
    yield task_data("answer of another type", lines({"problem": "x", "answer": "π"}), "line 1: `answer` cannot be used")
    yield task_data("answers of two types", lines({"problem": "x", "answer": "1"}, {"problem": "y", "answer": 2}),
        "a column holds values of different types")  # fmt: skip
    yield task_data("question twice", lines(aime[0], aime[1], aime[0]), "line 3: the same `problem` as in line 1")
    yield task_data("lone surrogate", b'{"problem": "\\ud83d", "answer": 1}\n', "line 1: not valid JSON .*surrogate")
    yield task_data("CSV, column missing", b"problem,anwser\nx,1\n", "row 1: `answer` is missing", name="aime_2026.csv")
    yield task_data("Parquet, cut", table("parquet", {"problem": ["x"], "answer": [1]})[:-9], "is not a PARQUET file",
        name="aime_2026.parquet")  # fmt: skip
    yield task_data("unknown decision", lines(abstract, {**abstract, "pubid": 2, "final_decision": "perhaps"}),
        "line 2: `final_decision` cannot be used", name="pubmedqa.jsonl")  # fmt: skip
    yield task_data("a task's own file, binary", BINARY, "test.jsonl|cannot be loaded", name="test.jsonl")
    yield task_data(
        "a task's own file, field missing", lines({"prompt": "x"}), "empty|cannot be loaded", name="test.jsonl"
    )

    yield outputs(
        "byte-order mark and CRLF", b'\xef\xbb\xbf{"raw": "55", "gold": "055"}\r\n', r"correct \| 1", works=True
    )
    yield outputs("empty", b"", "has no rows")
    yield outputs("a folder in its place", FOLDER, "outputs.jsonl is a folder")
    yield outputs("no permission", NO_PERMISSION, "no permission")
    yield outputs("binary", BINARY, "line 1: not UTF-8 text")
    yield outputs("fields missing", b'{"gold": "5"}\n', "line 1: the row has none of `raw`")
    yield outputs("field of another type", b'{"raw": 7}\n', "line 1: `raw` must be text, found int")
    yield outputs("lone surrogate", b'{"raw": "\\ud83d"}\n', "line 1: not valid JSON .*surrogate")
    yield outputs("completions of another type", b'{"response": {"body": {"choices": [7]}}}\n', "failed", works=True)


def place(form: Form, folder: Path) -> None:
    """A folder with good files, and the broken one in its place."""
    shutil.copytree(ROOT / "merge_configs", folder / "merge_configs")
    (folder / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "cpu.overlay.yaml", folder / "recipes")
    given = form.path if form.kind == "prompts" else "prompts.jsonl"
    good: dict[str, bytes] = {
        "prompts.jsonl": GOOD,
        "recipes/mine.yaml": RECIPE.replace("PROMPTS", given).encode(),
        "runs/mine/run.json": orjson.dumps(RUN),
        "runs/mine/iter-1/requests.jsonl": lines(request("p0-s0"), request("p1-s0")),
        "runs/mine/iter-1/generations.jsonl": lines(answer()),
    }
    if form.kind == "task data":
        shutil.copytree(ROOT / "lm_eval_tasks", folder / "lm_eval_tasks", ignore=shutil.ignore_patterns("__pycache__"))
        stem = Path(form.path).stem
        task = {"aime_2026": "aime", "pubmedqa": "pubmedqa"}.get(stem, "template")
        good["recipes/mine.yaml"] = good["recipes/mine.yaml"].replace(b"_template}", f"_{task}}}".encode())
        yaml = folder / "lm_eval_tasks" / "thinkswitch_template.yaml"
        yaml.write_text(yaml.read_text().replace("recipes/template/test.jsonl", form.path))
        (folder / "data").mkdir()
    for name, data in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    target = folder / form.path
    if form.data == FOLDER:
        target.unlink(missing_ok=True)
        target.mkdir()
    elif form.data == NO_PERMISSION:
        target.touch()
        target.chmod(0)
    else:
        data = form.data if isinstance(form.data, bytes) else form.data.encode()
        target.write_bytes(data.replace(b"PROMPTS", b"prompts.jsonl"))
    used = folder / "recipes/mine.yaml"
    if form.works and used.is_file():  # these forms do not concern axolotl's schema, which takes seconds
        found = {"inputs": {"recipes/mine.yaml": hashlib.sha256(used.read_bytes()).hexdigest()}}
        (folder / "runs/mine/.stamps").mkdir()
        (folder / "runs/mine/.stamps/recipe-checked.json").write_bytes(orjson.dumps(found))


def run(form: Form, *, fork: bool = False) -> dict[str, Any]:
    """What the command answers to a form, in a process of its own or in a fork of one that has the engines loaded."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        place(form, folder)
        command: tuple[str, ...] = (TS, *form.command)
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "THINKSWITCH_DATA": str(folder / "data"),
        }
        may_not_read = form.data == NO_PERMISSION and os.geteuid() == 0  # root may read everything
        if may_not_read:
            command = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", *command)
        if fork and not may_not_read:
            done = forked.run(command, folder, env, timeout=300)
        else:
            done = subprocess.run(
                command,
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=120,
                stdin=subprocess.DEVNULL,
            )
        text = (done.stderr if done.returncode else done.stdout).strip()
        return {
            "exit": done.returncode,
            "message": text.replace(f"{folder}/", ""),
            "traceback": "Traceback" in done.stderr,
        }


def is_right(form: Form, found: Mapping[str, Any]) -> bool:
    """Whether a form was answered as it should: in one sentence that names what is wrong, or by working."""
    import re

    named = re.search(form.says, found["message"], re.DOTALL) is not None
    if form.works:
        return found["exit"] == 0 and named
    one_line = len(found["message"].splitlines()) == 1 and len(found["message"]) < 600
    return found["exit"] == 1 and named and one_line and not found["traceback"]


def main() -> None:
    """Print the table, and a summary as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="only name the forms")
    options = parser.parse_args()
    every = list(forms())
    if options.list:
        print("\n".join(f"{form.kind}: {form.defect}" for form in every))
        return
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(partial(run, fork=True), every))
    print("| file | defect | answer | exit |\n|---|---|---|---|")
    wrong = []
    for form, found in zip(every, results, strict=True):
        message = found["message"].removeprefix("thinkswitch: ").replace("\n", " / ").replace("|", "\\|")
        print(f"| {form.kind} | {form.defect} | {message[:200]} | {found['exit']} |")
        if not is_right(form, found):
            wrong.append(f"{form.kind}: {form.defect}")
    for name in wrong:
        print(f"WRONG {name}")
    harmless = sum(form.works for form in every)
    print(json.dumps({"forms": len(every), "refused": len(every) - harmless, "harmless": harmless, "wrong": wrong}))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
