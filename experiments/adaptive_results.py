"""What the conditions of the adaptive experiment came to: table, intervals, claims.

The unit of every interval is the held-out question: a question's scores are averaged over the seeds first,
since all seeds are asked the same questions. How much two trainings of one condition differ is in no interval: it is
seen in the figures by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinkswitch_plugin import console
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import bootstrapped

Floats = NDArray[np.float64]

# Every condition by its name, in the order of the table.
TITLES = {
    "pre_only": "pre-thinking only",
    "post_only": "post-thinking only",
    "adaptive": "**adaptive** (labels, mixture, perception)",
    "no_prompt": "the same, no soft prompt",
    "static_prompt": "the same, one static soft prompt",
    "no_words": "the same, no word count (nor other features)",
    "no_attention": "the same, no cross-attention",
    "random_mixture": "trained on a random mixture of the formats",
    "random_choice": "random choice between the baselines, same share",
    "oracle": "oracle: post where it is right, else pre",
    "mlp_baselines": "MLP router on characters, between the baselines",
    "length_baselines": "logistic router on length, between the baselines",
    "mlp_adaptive": "MLP router on characters, steering the adaptive model",
    "length_adaptive": "logistic router on length, steering the adaptive model",
    "forced_pre": "adaptive model, made to think first",
    "forced_post": "adaptive model, made to answer first",
}
HALF = 0.5  # of pre-thinking's tokens: the most that adaptive may take
POINTS = 0.08  # of accuracy that adaptive must be above post-thinking


@dataclass(frozen=True)
class Condition:
    """One condition on the held-out questions: each array is (seeds, questions).

    Attributes:
        correct: right or wrong, or the expected score of a random choice.
        tokens: generated up to the answer, the token that ended it included.
        think: whether it thought first, or how often it would.
    """

    correct: Floats
    tokens: Floats
    think: Floats

    def where(self, chosen: NDArray[np.bool_]) -> Condition:
        """The same on some questions only."""
        return Condition(self.correct[:, chosen], self.tokens[:, chosen], self.think[:, chosen])


def mixed(one: Condition, other: Condition, share: Floats | float) -> Condition:
    """`one` on a share of the questions and `other` on the rest.

    Args:
        share: probability of `one`: a number, one a seed (seeds, 1), or one a question (seeds, questions).
    """
    rest = 1 - np.asarray(share)
    return Condition(
        one.correct * share + other.correct * rest,
        one.tokens * share + other.tokens * rest,
        one.think * share + other.think * rest,
    )


def derived(found: Mapping[str, Condition], routed: Mapping[str, Floats]) -> dict[str, Condition]:
    """The conditions that need no generation of their own.

    Args:
        found: the generated conditions; `adaptive`, the baselines and both forced ones among them.
        routed: by router, whether it sends a question to thinking, (seeds, questions) of 0 and 1.
    """
    pre, post = found["pre_only"], found["post_only"]
    share = found["adaptive"].think.mean(axis=1, keepdims=True)
    more = {"random_choice": mixed(pre, post, share), "oracle": mixed(post, pre, post.correct)}
    for name, think in routed.items():
        more[f"{name}_baselines"] = mixed(pre, post, think)
        more[f"{name}_adaptive"] = mixed(found["forced_pre"], found["forced_post"], think)
    return more


def figures(condition: Condition, strata: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its 95 % interval, by seed and by stratum, tokens and think share."""

    def short(part: Condition) -> dict[str, float]:
        return {
            "accuracy": float(part.correct.mean()),
            "tokens": float(part.tokens.mean()),
            "think_share": float(part.think.mean()),
        }

    names = np.asarray(strata)
    return {
        **short(condition),
        "ci95": bootstrapped(condition.correct.mean(axis=0).tolist()),
        "by_seed": condition.correct.mean(axis=1).tolist(),
        "strata": {name: short(condition.where(names == name)) for name in sorted(set(strata))},
    }


def difference(one: Condition, other: Condition) -> dict[str, Any]:
    """How much more accurate `one` is, with its 95 % interval (bootstrap over questions), and its tokens over `other`'s."""
    per_question = (one.correct - other.correct).mean(axis=0)
    return {
        "accuracy": float(per_question.mean()),
        "ci95": bootstrapped(per_question.tolist()),
        "by_seed": (one.correct - other.correct).mean(axis=1).tolist(),
        "tokens": float(one.tokens.mean() / other.tokens.mean()),
    }


def claims(found: Mapping[str, Condition]) -> list[dict[str, Any]]:
    """What the experiment is to show, each with whether it holds; then what it tells of labels and soft prompt.

    The first three are held against the measured means, the others against the interval.
    """
    against = {name: difference(found["adaptive"], found[name]) for name in found if name != "adaptive"}
    pre, post = against["pre_only"], against["post_only"]
    stated = [
        _claim("adaptive is on average at least as accurate as pre-thinking only", pre["accuracy"] >= 0, pre),
        _claim(
            f"adaptive takes at most {100 * HALF:.0f} % of the tokens of pre-thinking only", pre["tokens"] <= HALF, pre
        ),
        _claim(
            f"adaptive is on average at least {100 * POINTS:.0f} points above post-thinking only",
            post["accuracy"] >= POINTS,
            post,
        ),
    ]
    for name, words in (
        ("random_choice", "a random choice between the baselines at the same share"),
        ("random_mixture", "a model trained on a random mixture"),
        ("no_prompt", "the same model without a soft prompt"),
        ("static_prompt", "the same model with one static soft prompt"),
    ):
        if name not in against:  # left out by CONDITIONS=
            continue
        low, high = against[name]["ci95"]
        stated.append(
            _claim(f"adaptive is more accurate than {words}, outside the 95 % interval", low > 0, against[name])
        )
        if high < 0:
            stated[-1]["claim"] += " (it is less accurate)"
    return stated


def _claim(text: str, holds: bool, of: dict[str, Any]) -> dict[str, Any]:
    return {"claim": text, "holds": bool(holds), **of}


def summary(found: Mapping[str, Condition], strata: Sequence[str]) -> dict[str, Any]:
    """Conditions, claims and differences as `adaptive.json` holds them.

    Raises `ThinkSwitchError` if the conditions are not of the same seeds and questions.
    """
    shapes = {condition.correct.shape for condition in found.values()}
    if len(shapes) != 1 or next(iter(shapes))[1] != len(strata):
        raise ThinkSwitchError(
            "the conditions were evaluated on different questions; delete the folder `conditions` and run it again."
        )
    return {
        "questions": len(strata),
        "conditions": {name: figures(found[name], strata) for name in TITLES if name in found},
        "claims": claims(found),
    }


def _row(name: str, condition: dict[str, Any], strata: Sequence[str]) -> list[str]:
    low, high = (100 * v for v in condition["ci95"])
    seeds = " ".join(f"{100 * v:.1f}" for v in condition["by_seed"])
    return [
        TITLES[name],
        f"{100 * condition['accuracy']:.1f} % ({seeds})",
        f"{low:.1f}–{high:.1f}",
        f"{condition['tokens']:.1f}",
        f"{100 * condition['think_share']:.0f} %",
        *(f"{100 * condition['strata'][s]['accuracy']:.1f} %" for s in strata),
    ]


def markdown(result: dict[str, Any]) -> str:
    """`adaptive.md`: the table of all conditions, the strata, the claims, and the prefix swap."""
    conditions = result["conditions"]
    strata = list(next(iter(conditions.values()))["strata"])
    lines = [
        f"Domain {result['domain']}, seeds {', '.join(map(str, result['seeds']))}, "
        f"{result['questions']} held-out questions, greedy.\n"
    ]
    header = ["condition", "accuracy (by seed)", "95 % interval", "tokens", "thinks", *strata]
    lines += [*console.table(header, [_row(name, c, strata) for name, c in conditions.items()]), ""]
    main = conditions["adaptive"]["strata"]
    lines += [
        "The adaptive model by stratum:",
        "",
        *console.table(
            ["stratum", "accuracy", "tokens", "thinks"],
            [
                [s, f"{100 * m['accuracy']:.1f} %", f"{m['tokens']:.1f}", f"{100 * m['think_share']:.0f} %"]
                for s, m in main.items()
            ],
        ),
        "",
    ]
    lines += [
        "Intervals are bootstraps over the questions, the seeds averaged first; two trainings of one condition differ too, "
        "which only the figures by seed show.",
        "",
    ]
    for claim in result["claims"]:
        low, high = (100 * v for v in claim["ci95"])
        seeds = " ".join(f"{100 * v:+.1f}" for v in claim["by_seed"])
        lines.append(
            f"- {'yes' if claim['holds'] else 'NO'}: {claim['claim']} "
            f"({100 * claim['accuracy']:+.1f} points, {low:+.1f} to {high:+.1f}; by seed {seeds}; at {claim['tokens']:.2f} of the tokens)"
        )
    if swap := result.get("swap"):
        lines += [
            "",
            f"Prefix swap: with another question's soft prompt, drawn at random, {swap['decisions_changed']} of {swap['questions']} decisions "
            f"and {swap['answers_changed']} answers change, and {100 * swap['accuracy']:.1f} % are right; between questions the prompts differ by a standard "
            f"deviation of {swap['prompt_std']:.4f}, where their root mean square is {swap['prompt_rms']:.4f}.",
        ]
    if served := result.get("served"):
        lines += [
            "",
            f"vLLM, sent the prompts as embeddings, gave {served['equal']} of {served['questions']} answers to the letter "
            "as transformers did.",
        ]
    return "\n".join(lines) + "\n"
