"""The mergekit method `thinkswitch`: λ by kind of module, on the sphere or the line.

    merge_method: thinkswitch
    base_model: ./thinking
    models: [{model: ./instruct}, {model: ./thinking}]
    parameters:
      lambda: 0.9               # weight of the thinking checkpoint
      lambda_attention: 0.8     # optional, each defaults to `lambda`
      lambda_ffn: 0.95
      lambda_rest: 0.9
      path: spherical           # or linear

mergekit has no discovery for outside methods, so the module must be imported before
a config is read: `thinkswitch merge CONFIG OUT [mergekit-yaml's own options]` does that.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from mergekit.merge_methods import base, registry
from pydantic import Field

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.config import NAME
from thinkswitch_plugin.merging.kernel import NonFiniteError, interpolate, non_finite
from thinkswitch_plugin.merging.mergekit_private import use_kernel

Weight = Annotated[float, Field(allow_inf_nan=False, strict=False)]
KINDS: dict[Literal["attention", "ffn"], set[str]] = {
    "attention": {"self_attn", "attention", "attn", "linear_attn"},
    "ffn": {"mlp", "ffn", "feed_forward", "block_sparse_moe"},
}


def module_kind(name: str) -> Literal["attention", "ffn", "rest"]:
    """What kind of module a tensor belongs to, by its Hugging Face name.

    `model.layers.3.self_attn.q_proj.weight` -> attention, `…mlp.down_proj.weight` -> ffn,
    embeddings and norms outside both -> rest.
    """
    parts = set(name.split("."))
    return next((kind for kind, modules in KINDS.items() if parts & modules), "rest")


def merge_group(group: base.TensorGroup, **parameters: Any) -> torch.Tensor:
    """One output tensor from its (instruct, thinking) inputs; the base is the thinking one."""
    assert group.base is not None
    name, instruct, thinking = group.metadata.name or "", group.non_base[0], group.base
    weight = parameters[f"lambda_{module_kind(name)}"]
    try:
        return interpolate(
            instruct.tensor,
            thinking.tensor,
            parameters["lambda"] if weight is None else weight,
            spherical=parameters["path"] == "spherical",
        )
    except NonFiniteError as error:
        raise ThinkSwitchError(non_finite(str(instruct.id if error.side == "first" else thinking.id), name)) from None


def _parameter(name: str, kind: Any, **default: Any) -> base.ParameterSpec:
    return base.ParameterSpec(name=name, value_type=kind, scope=base.ParameterScope.SHARED, **default)


# Not by mergekit's decorator: that takes parameters from a function's arguments, and `lambda` cannot be one.
METHOD = base.FunctionalGroupMergeMethod(
    base.MergeMethodSpec(
        name=NAME,
        pretty_name="ThinkSwitch",
        reference_url="https://arxiv.org/abs/2606.01080",
        contract=base.InputContract(base=base.BasePolicy.REQUIRED, min_inputs=2, max_inputs=2),
        parameters=(
            _parameter("lambda", Weight),
            *(_parameter(f"lambda_{kind}", Weight | None, default=None) for kind in (*KINDS, "rest")),
            _parameter("path", Literal["spherical", "linear"], default="spherical"),
        ),
    ),
    merge_group,
)


def register() -> None:
    """Make `merge_method: thinkswitch` known to mergekit in this process, and have it compute `slerp` in our kernel."""
    use_kernel()
    if METHOD not in registry.registered_methods():
        registry.register(METHOD)
