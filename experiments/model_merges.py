"""The columns of docs/models.md that merge or compare: each result is held against a float64 computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.model_pairs import BOTH, Model
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

Tensors = dict[str, torch.Tensor]
LAMBDA = 0.4


def same_layout(roles: dict[str, Path]) -> bool:
    """Whether both checkpoints store the same tensors, but for those in only one that the model ignores."""
    return (
        len({frozenset(n for n in load_file(str(f / "model.safetensors")) if "expert" in n) for f in roles.values()})
        == 1
    )


def tensors_of(roles: dict[str, Path]) -> dict[str, Tensors]:
    """Both checkpoints' tensors, in the files' layout where they share one, else as transformers loads them."""
    if same_layout(roles):
        return {mode: load_file(str(folder / "model.safetensors")) for mode, folder in roles.items()}
    return {mode: loaded(folder).state_dict() for mode, folder in roles.items()}


def loaded(folder: Path) -> Any:
    """The model of a checkpoint. Raises `AssertionError` if a key is missing or unexpected."""
    import transformers

    kind = getattr(transformers, files.read_json(folder / "config.json")["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    wrong = {name: keys for name, keys in info.items() if keys and name != "error_msgs"}
    extra = {"unexpected_keys"} if all(is_mtp(key) for key in info["unexpected_keys"]) else set()
    assert not wrong.keys() - extra, f"{folder.name} loads with {wrong}"
    return model


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to a head that transformers leaves out."""
    return name.startswith("mtp.") or "eh_proj" in name


def interpolated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The point at `LAMBDA` between two tensors on the sphere through both, in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    cosine = float(x @ y / (x.norm() * y.norm())) if bool(x.norm()) and bool(y.norm()) else 1.0
    angle = float(torch.arccos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1)))
    if angle < 1e-6:
        return a.double() * (1 - LAMBDA) + b.double() * LAMBDA
    shares = [float(torch.sin(torch.tensor(part * angle, dtype=torch.float64))) for part in (1 - LAMBDA, LAMBDA)]
    sine = float(torch.sin(torch.tensor(angle, dtype=torch.float64)))
    return (shares[0] / sine) * a.double() + (shares[1] / sine) * b.double()


def merge_config(roles: dict[str, Path]) -> dict[str, Any]:
    """A merge config for the pair."""
    return {
        "merge_method": "thinkswitch",
        "base_model": str(roles["thinking"]),
        "models": [{"model": str(roles[mode])} for mode in BOTH],
        "parameters": {"lambda": LAMBDA},
    }


def require_equal(found: Tensors, roles: dict[str, Path], extra: dict[str, tuple[str, ...]]) -> None:
    """Raise `AssertionError` if a tensor is not what float64 makes of the pair, or is missing."""
    both = tensors_of(roles)
    a, b = both["instruct"], both["thinking"]
    for name in a.keys() | b.keys() | extra.keys():
        if name in extra and len(extra[name]) == 1:
            expected = load_file(str(roles[extra[name][0]] / "model.safetensors"))[name].double()
        else:
            expected = interpolated(a[name], b[name])
        assert name in found, f"{name} is lost"
        error = float((found[name].double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        assert error < 1e-5, f"{name} is off by {error:.1g}"


def merge(model: Model, roles: dict[str, Path], folder: Path) -> None:
    """`thinkswitch merge` on disk."""
    from mergekit.options import MergeOptions

    from thinkswitch_plugin.merging.run import merge as merge_to_disk

    files.write_yaml(folder / "merge.yaml", merge_config(roles))
    out = folder / "merged"
    try:
        merge_to_disk(folder / "merge.yaml", out, MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"))
    except ThinkSwitchError:
        assert not out.exists(), "a refused merge left a folder"
        raise
    found = loaded(out).state_dict() if not same_layout(roles) else {}
    require_equal(found | read(out), roles, model.extra)
    loaded(out)


def merged_folder(model: Model, roles: dict[str, Path], folder: Path) -> Path:
    """The pair merged on disk."""
    if not (folder / "merged").is_dir():
        merge(model, roles, folder)
    return folder / "merged"


def similarity(model: Model, roles: dict[str, Path], folder: Path) -> None:
    """`thinkswitch similarity`."""
    from thinkswitch_plugin.merging.compatibility import require_compatible
    from thinkswitch_plugin.merging.similarity import similarity as compare

    require_compatible(roles["instruct"], roles["thinking"])
    both = tensors_of(roles)
    shared = both["instruct"].keys() & both["thinking"].keys()
    distinct = {both["instruct"][name].data_ptr(): name for name in sorted(shared)}.values()
    pairs = [(both["instruct"][name].double(), both["thinking"][name].double()) for name in distinct]
    sigma = sum(float((a - b).abs().sum()) for a, b in pairs) / sum(
        float(a.abs().sum() + b.abs().sum()) for a, b in pairs
    )
    found = compare(roles["instruct"], roles["thinking"])["sigma"]
    assert abs(found - sigma) < 1e-5 * sigma, f"σ is {found}, not {sigma}"


def sweep_in_memory(model: Model, roles: dict[str, Path], folder: Path) -> None:
    """A point of a sweep, merged into a loaded model, which then computes."""
    from thinkswitch_plugin.merging.in_memory import load, merge_into

    network = load(roles["thinking"], {}, device="cpu")
    merge_into(network, merge_config(roles))
    expected = loaded(merged_folder(model, roles, folder)).state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), f"{name} differs from the merge on disk"
    with torch.no_grad():
        assert bool(torch.isfinite(network(torch.arange(3, 11)[None]).logits).all())


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder."""
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(str(shard)).items()}
