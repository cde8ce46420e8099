"""Rules for the whole package: where settings come from, its limits of length, and that a domain consists of files only."""

from __future__ import annotations

import ast
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT
from thinkswitch_plugin import files, recipe
from thinkswitch_plugin.data import batch, prompts, task_files
from thinkswitch_plugin.loop import check

PACKAGE = ROOT / "thinkswitch_plugin"
# CUDA devices, certificates and keys belong to other programs, and a key must not be part of values that are stored.
# The worker runs inside vLLM, whose key is in its environment.
MAY_READ = {PACKAGE / "environment.py", PACKAGE / "engines" / "live_worker.py"}

MODULE, FUNCTION = 300, 60  # lines


def reads_of_the_environment(path: Path) -> list[str]:
    """Where a module reads a variable. Setting one does not count, nor does passing all of them to a child process."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    above = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = []
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and {n.name for n in node.names}
        around = above.get(node)
        allowed = (
            (isinstance(around, ast.Attribute) and around.attr == "setdefault")
            or (isinstance(around, ast.Subscript) and isinstance(around.ctx, ast.Store))
            or (isinstance(around, ast.Dict) and node in around.values)
        )
        if (imported and imported & {"environ", "getenv"}) or name == "getenv" or (name == "environ" and not allowed):
            found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    return found


def test_no_module_reads_the_environment() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if path not in MAY_READ]
    assert [place for path in modules for place in reads_of_the_environment(path)] == []
    assert all(reads_of_the_environment(path) for path in MAY_READ)


def test_no_module_and_no_function_is_longer_than_a_reader_can_hold() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE))
        if len(text.splitlines()) > MODULE:
            found[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION:  # type: ignore[operator]
                found[f"{name}:{node.name}"] = lines
    assert found == {}


def test_the_checkouts_files_are_found_from_any_folder_and_the_users_own_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe.recipe_of("arithmetic", ["24gb"]).path == ROOT / "recipes" / "arithmetic.yaml"
    assert task_files.kind_of_task("thinkswitch_aime") == "integer"
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "arithmetic.yaml", tmp_path / "recipes")
    assert recipe.recipe_path("arithmetic") == Path("recipes/arithmetic.yaml")


@pytest.fixture
def domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a domain of three files: a recipe, prompts, and a task with its questions."""
    text = (ROOT / "recipes" / "template.yaml").read_text(encoding="utf-8")
    task = (ROOT / "lm_eval_tasks" / "thinkswitch_template.yaml").read_text(encoding="utf-8")
    for place in ("recipes", "lm_eval_tasks"):
        (tmp_path / place).mkdir()
    rows = [{"sum": f"{n} plus {n}", "answer": str(2 * n)} for n in range(40)]
    lines = [files.dumps_line(row) for row in rows]
    (tmp_path / "sums.jsonl").write_bytes(b"".join(lines[:20]))
    (tmp_path / "held-out.jsonl").write_bytes(b"".join(lines[20:]))
    text = "".join(line for line in text.splitlines(keepends=True) if "demo: true" not in line)
    text = text.replace("domain: template", "domain: sums").replace("thinkswitch_template", "sums")
    text = text.replace("recipes/template/prompts.jsonl", "sums.jsonl").replace("{{prompt}}", "{{sum}}")
    text = text.replace("count: 64", "count: 8")
    (tmp_path / "recipes" / "sums.yaml").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "lm_eval_tasks" / "thinkswitch_tasks.py", tmp_path / "lm_eval_tasks")
    task = task.replace("thinkswitch_template", "sums").replace("recipes/template/test.jsonl", "held-out.jsonl")
    (tmp_path / "lm_eval_tasks" / "sums.yaml").write_text(task.replace("{{prompt}}", "{{sum}}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_domain_is_a_recipe_its_rows_and_a_task(domain: Path) -> None:
    sums = recipe.recipe_of("sums")
    keys = sums.keys
    assert prompts.read_prompts(keys.prompts, 0)[0][1] == ("p00001", "1 plus 1")
    assert task_files.kind_of_task("sums") == "exact"
    assert task_files.evaluation_set("sums") == ("sums", "sums")
    assert task_files.evaluation_set("thinkswitch_aime_k8") == ("MathArena/aime_2026", "AIME 2026")
    assert "8, of commit (a local file)" in check.rendered_prompts(keys)
    assert check.questions(sums, {}) == "sums loads, 20 questions; no training prompt is in it"
    chosen, _ = prompts.prompts_of_iteration(keys.prompts, 0, 1)
    how = batch.Asked()
    asked = {"model": "m", "how": how, "sampling": keys.sampling, "seed": 0}
    chosen = [(name, prompts.messages(keys.prompts, text)) for name, text in chosen]
    assert prompts.write_requests(domain / "requests.jsonl", chosen, **asked) == 8
    (_, first), *_ = files.read_jsonl(domain / "requests.jsonl")
    assert first["body"]["messages"] == [{"role": "user", "content": "0 plus 0"}]


def test_the_wheel_has_every_room() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    data = {name for name in listed if name.startswith("thinkswitch_plugin.shipped")}  # files, see tests/test_wheel.py
    assert set(listed) - data == {*rooms, "lm_eval.tasks.thinkswitch"}
