"""A small router: how likely is it that a question needs thinking, by its text alone.

Every part is scikit-learn's. The candidates differ in what they look at; the one with the lowest log loss under
cross-validation on the label prompts is kept. The questions of an evaluation never take part in that choice.

`router.skops` is read by skops, which builds only the types that it knows and those of `ALLOWED`; no other code runs.
"""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sklearn.pipeline import Pipeline

FORMAT = "thinkswitch router 1"  # a change of `describe` makes another
PLACES = 16  # characters that are looked at by their place, from the start and from the end
FOLDS = 5
STRENGTHS = (0.1, 1.0, 10.0)  # C of the logistic regressions, the inverse of their regularisation
CONSTANT = "constant"
HIGHEST = 1 - 1e-9  # so that threshold 1 never thinks
# What skops does not know by itself and a router may hold: the MLP's optimizer, private in scikit-learn 1.9.
ALLOWED = ("sklearn.neural_network._stochastic_optimizers.AdamOptimizer",)


def require_installed() -> None:
    """Import what makes and reads a router; once transformers is loaded, skops takes four times as long (0.16).

    Raises `ThinkSwitchError` if it is not installed.
    """
    try:
        import skops.io  # noqa: F401
    except ImportError:
        raise ThinkSwitchError(
            "the router needs scikit-learn and skops; run `make setup`, or `pip install '.[loop]'` in a clone of the project."
        ) from None


@dataclass(frozen=True)
class Router:
    """A trained router; `name` says what it looks at."""

    name: str
    pipeline: Pipeline

    def p_think(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """The probability that each prompt needs thinking, in [0, 1), one a prompt."""
        if not prompts:
            return np.zeros(0)
        return of_thinking(self.pipeline.predict_proba(describe(prompts)))

    def save(self, path: Path) -> None:
        """Write the router whole or not at all."""
        import sklearn
        from skops.io import dumps

        content = {"format": FORMAT, "name": self.name, "sklearn": sklearn.__version__, "pipeline": self.pipeline}
        with files.atomic_file(path) as handle:
            handle.write(dumps(content, compression=zipfile.ZIP_DEFLATED))

    @classmethod
    def load(cls, path: Path) -> Router:
        """Read a router. Raises `ThinkSwitchError` for any other file, or one that holds anything else."""
        require_installed()
        import sklearn
        from skops.io import get_untrusted_types, loads

        try:
            data = path.read_bytes()
        except OSError as error:
            raise files.unreadable(path, error) from None
        try:
            unknown = sorted(set(get_untrusted_types(data=data)) - set(ALLOWED))
            content = {} if unknown else loads(data, trusted=list(ALLOWED))
        except Exception as error:  # a damaged archive fails in as many ways as there are parts in it
            raise ThinkSwitchError(
                f"{path} is not a router file ({type(error).__name__}); train one by `make switch` or restore the file."
            ) from None
        if unknown:
            raise ThinkSwitchError(
                f"{path} holds {', '.join(unknown)[:200]}, which a router does not; it is not loaded: use only files "
                "that `make switch` has written."
            )
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ThinkSwitchError(f"{path} is not a router of this version; train one by `make switch`.")
        if str(content["sklearn"]).split(".")[:2] != sklearn.__version__.split(".")[:2]:
            raise ThinkSwitchError(
                f"{path} was made with scikit-learn {content['sklearn']}, and {sklearn.__version__} is installed; "
                "train it again by `make switch`."
            )
        return cls(content["name"], content["pipeline"])


def describe(prompts: Sequence[str]) -> NDArray[np.object_]:
    """What the candidates look at: text, characters by their place, words, characters; (prompts, 4)."""
    return np.array([[text, by_place(text), len(text.split()), len(text)] for text in prompts], dtype=object)


def by_place(text: str) -> str:
    """The first and last characters of a text as words that name their place: `s0=7 s1=* … e0=2 e1=*`."""
    solid = re.sub(r"\s", "_", text)
    ends = (("s", solid[:PLACES]), ("e", solid[: -PLACES - 1 : -1]))
    return " ".join(f"{end}{i}={character}" for end, part in ends for i, character in enumerate(part))


def of_thinking(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """The second column of what a classifier predicts, kept below 1."""
    return np.minimum(np.asarray(probabilities, dtype=np.float64)[:, 1], HIGHEST)


def candidates(seed: int) -> dict[str, Pipeline]:
    """Every router that is tried, by name; `CONSTANT` knows only the share of prompts that need thinking."""
    from sklearn.compose import ColumnTransformer
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    columns: dict[str, tuple[Any, Any]] = {
        "length": ("passthrough", [2, 3]),
        "words": (TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True, min_df=2), 0),
        "characters": (CountVectorizer(analyzer="char", lowercase=False), 0),
        "runs": (CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, min_df=2), 0),
        "places": (CountVectorizer(token_pattern=r"\S+", lowercase=False, binary=True), 1),
    }
    parts = {
        "length": ["length"],
        "length, words": ["length", "words"],
        "length, characters": ["length", "characters"],
        "length, runs of 1 to 3 characters": ["length", "runs"],
        "length, characters by place": ["length", "places"],
        "length, runs, places": ["length", "runs", "places"],
    }

    def pipeline(name: str, classifier: Any) -> Pipeline:
        transformers = [(part, *columns[part]) for part in parts[name]]
        return make_pipeline(ColumnTransformer(transformers, sparse_threshold=1.0), MaxAbsScaler(), classifier)

    found = {CONSTANT: make_pipeline(DummyClassifier(strategy="prior"))}
    for name, strength in itertools.product(parts, STRENGTHS):
        classifier = LogisticRegression(C=strength, max_iter=5000)
        found[f"{name}; logistic regression, C {strength:g}"] = pipeline(name, classifier)
    for name in ("length, characters", "length, characters by place"):
        network = MLPClassifier((32,), alpha=1.0, max_iter=500, random_state=seed)
        found[f"{name}; MLP"] = pipeline(name, network)
    return found


@dataclass(frozen=True)
class Trained:
    """The chosen router, fitted on all label prompts, and how it was chosen.

    Attributes:
        others: the best router of each other kind, to compare with.
        p: of every label prompt, from the fold in which it was left out; (prompts,).
        tried: a row a candidate: name, log loss, Brier score, area under the ROC curve; the best first.
        reliability: of the chosen one, in bins of equal size: mean p, and the share that did need thinking.
    """

    router: Router
    others: list[Router]
    p: NDArray[np.float64]
    tried: list[dict[str, Any]]
    reliability: list[dict[str, float]]


def train(prompts: Sequence[str], needs_thinking: Sequence[bool], seed: int) -> Trained:
    """Choose a router by cross-validation on these prompts and fit it on all of them.

    A prompt that occurs more than once lies in one fold.
    Raises `ThinkSwitchError` if there is too little of one of the two labels to learn from.
    """
    require_installed()
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    y = np.asarray(needs_thinking, dtype=int)
    for label, what in ((1, "need thinking"), (0, "do not need it")):
        if (count := len({p for p, found in zip(prompts, y, strict=True) if found == label})) < 2 * FOLDS:
            raise ThinkSwitchError(
                f"Only {count} of {len(y)} label prompts {what}, and {2 * FOLDS} are needed to learn from; "
                "label more prompts, or always ask the checkpoint that the labels speak for."
            )
    x, number = describe(prompts), {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    groups = [number[text] for text in prompts]
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    out_of_fold: dict[str, NDArray[np.float64]] = {}
    tried: list[dict[str, Any]] = []
    for name, pipeline in candidates(seed).items():
        try:
            predicted = cross_val_predict(pipeline, x, y, groups=groups, cv=split, method="predict_proba")
        except ValueError:  # no word and no run of characters occurs twice: nothing to look at
            continue
        p = out_of_fold[name] = of_thinking(predicted)
        loss, brier, area = log_loss(y, p, labels=[0, 1]), brier_score_loss(y, p), roc_auc_score(y, p)
        tried.append({"name": name, "log_loss": float(loss), "brier": float(brier), "roc_auc": float(area)})
    tried.sort(key=lambda row: row["log_loss"])
    routers = [Router(name, candidates(seed)[name].fit(x, y)) for name in best_of_each(tried)]
    p = out_of_fold[routers[0].name]
    share, mean = calibration_curve(y, p, n_bins=FOLDS, strategy="quantile")
    reliability = [{"p": float(m), "share": float(s)} for m, s in zip(mean, share, strict=True)]
    return Trained(routers[0], routers[1:], p, tried, reliability)


def best_of_each(tried: Sequence[dict[str, Any]]) -> list[str]:
    """Of routers that differ only in their regularisation the best one, by name; `tried` is sorted, the best first."""
    found: dict[str, str] = {}
    for row in tried:
        found.setdefault(row["name"].partition(", C ")[0], row["name"])
    return list(found.values())


def threshold_that_keeps(p: NDArray[np.float64], needs_thinking: Sequence[bool], keep: float) -> float:
    """The largest threshold at which at most 1 − `keep` of the prompts need thinking and do not get it.

    Args:
        p: of every label prompt, from the fold in which it was left out.
    """
    needing = np.sort(p[np.asarray(needs_thinking, dtype=bool)])
    allowed = int((1 - keep) * len(p) + 1e-9)
    return float(needing[allowed]) if allowed < len(needing) else 1.0
