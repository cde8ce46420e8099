from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from thinkswitch_plugin import files, recipe
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import check

ARITHMETIC = Path("recipes/arithmetic.yaml")


def changed(tmp_path: Path, change: dict[str, Any], section: str | None = None) -> Path:
    values = yaml.safe_load(ARITHMETIC.read_text())
    target = values["thinkswitch"] if section is not None else values
    (target[section] if section else target).update(change)
    path = tmp_path / "arithmetic.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_recipes_of_the_project_are_valid() -> None:
    for path in sorted(Path("recipes").glob("*.yaml")):
        if ".overlay" not in path.name:
            loaded = recipe.load_recipe(path)
            assert loaded.keys.domain == path.stem
            recipe.check_axolotl_keys(loaded)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("rebuild", {"lamda": 0.9}, r"unknown key `thinkswitch.rebuild.lamda`; did you mean `lambda`"),
        ("answers", {"selection": "best"}, r"`thinkswitch.answers.selection`: .* \(found 'best'\)"),
        ("sampling", {"max_tokens": "many"}, "`thinkswitch.sampling.max_tokens`"),
        ("prompts", {"hub": "a/b"}, "give either `path`"),
        ("prompts", {"a\nb": None}, r"unknown key `thinkswitch.prompts.'a\\nb'`"),
        ("", {"labels": {}}, "`thinkswitch`: the key `labels` is called `answers` now"),
        ("answers", {"answer": "digit"}, "`thinkswitch.answers`: the key `answer` is called `kind` now"),
        ("pair", {"embedded": True}, "`thinkswitch.pair`: the key `embedded` is called `demo` now"),
        ("", {"domian": "x"}, "unknown key `thinkswitch.domian`; did you mean `domain`"),
    ],
)
def test_a_typo_in_our_keys_is_one_sentence(tmp_path: Path, section: str, change: dict[str, Any], message: str) -> None:
    path = changed(tmp_path, change, section)
    with pytest.raises(ThinkSwitchError, match=message) as caught:
        recipe.load_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["trust_remote_code\n", "a\nb.trust_remote_code"])
def test_a_line_break_hides_no_trust_and_breaks_no_sentence(tmp_path: Path, key: str) -> None:
    with pytest.raises(ThinkSwitchError, match="would run code") as caught:
        recipe.load_recipe(changed(tmp_path, {key: True}))
    assert "\n" not in str(caught.value)


def test_a_typo_in_axolotls_keys_is_caught_too(tmp_path: Path) -> None:
    loaded = recipe.load_recipe(changed(tmp_path, {"learning_rat": 1}))
    with pytest.raises(ThinkSwitchError, match="axolotl knows no key `learning_rat`; did you mean `learning_rate`"):
        recipe.check_axolotl_keys(loaded)


@pytest.mark.parametrize("domain", ["../etc", "a/b", "", "x;y", ".hidden"])
def test_a_domain_cannot_leave_the_recipes(domain: str) -> None:
    with pytest.raises(ThinkSwitchError, match="is not a domain name"):
        recipe.recipe_path(domain)


def test_an_unknown_domain_names_the_known_ones() -> None:
    with pytest.raises(ThinkSwitchError, match=r"Did you mean arithmetic\?"):
        recipe.recipe_path("arithmetics")


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb: [1,\n")
    with pytest.raises(ThinkSwitchError, match=r"x\.yaml, line 3"):
        recipe.load_recipe(path)


@pytest.mark.parametrize(
    ("name", "overlay"),
    [
        ("aime", ""),
        ("aime", "24gb"),
        ("aime", "qwen3-30b"),
        ("aime", "24gb llama-r1"),
        ("pubmedqa", ""),
        ("pubmedqa", "qwen3-30b"),
        ("pubmedqa", "24gb llama-r1"),
        ("template", ""),
        ("arithmetic-mixed", ""),
    ],
)
def test_recipes_pass_axolotls_own_schema_as_they_stand(name: str, overlay: str) -> None:
    overlays = tuple(recipe.overlay_path(word) for word in overlay.split())
    recipe.check_axolotl_keys(recipe.load_recipe(Path(f"recipes/{name}.yaml"), overlays))
    values = files.read_yaml(Path(f"recipes/{name}.yaml"))
    for path in overlays:
        values = recipe.overlay(values, files.read_yaml(path))
    check.validate(values, name)
    with pytest.raises(ThinkSwitchError, match="axolotl refuses `micro_batch_size`"):
        check.validate({**values, "micro_batch_size": "many"}, name)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({}, None),
        ({"perception": {}, "answers": {"kind": "digit"}, "min_adapter_change": 0}, None),
        ({"perception": {"tokens": 2, "static": True}}, None),
        ({"perceptoin": {}}, "thinkswitch.perceptoin"),
        ({"perception": {"tokens": 0}}, "thinkswitch.perception.tokens"),
        ({"perception": {"cross_attention": False, "features": []}}, "nothing of the question is read"),
        ({"prompts": {"path": "p"}, "perception": {}}, "thinkswitch.domain"),
    ],
)
def test_a_plain_recipe_needs_only_the_keys_of_the_plugin(section: dict[str, Any], problem: str | None) -> None:
    from thinkswitch_plugin.args import ThinkSwitchArgs

    if problem is None:
        whole = ThinkSwitchArgs.model_validate({"thinkswitch": section}).model_dump(exclude_defaults=True)
        assert whole == {"thinkswitch": section}
    else:
        with pytest.raises(ValidationError, match=problem):
            ThinkSwitchArgs.model_validate({"thinkswitch": section})


def test_an_overlay_merges_mappings_and_null_takes_a_key_away() -> None:
    base = {"a": 1, "thinkswitch": {"prompts": {"hub": "x", "count": 15}}}
    extra = {"thinkswitch": {"prompts": {"hub": None, "path": "p"}}}
    assert recipe.overlay(base, extra) == {"a": 1, "thinkswitch": {"prompts": {"count": 15, "path": "p"}}}


def test_the_documents_hold_every_key_as_the_command_prints_it() -> None:
    from click.testing import CliRunner

    from thinkswitch_plugin.cli import keys

    printed = CliRunner().invoke(keys).output
    assert "| `rebuild.lambda` | number | `0.8` |" in printed
    assert Path("docs/recipes.md").read_text(encoding="utf-8").endswith(printed)
