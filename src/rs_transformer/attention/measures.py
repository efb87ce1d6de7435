"""Measures of attention and hidden states as arrays, and their means over a corpus with confidence intervals.

Not for models (`collection.py`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 12345  # sacreBLEU's
INTERVAL_SENTENCES = 20  # of fewer, a percentile bootstrap's interval is too narrow
JACKKNIFE_GROUPS = 20
STUDENT_T = 2.093  # two-sided 95% with one degree of freedom less than there are groups


def entropy(attention: np.ndarray) -> np.ndarray:
    """Shannon entropy of distributions over the last axis, in bits: `(…, keys)` to `(…)`."""
    return -(attention * np.log2(np.where(attention > 0, attention, 1))).sum(-1)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine similarity over the last axis: twice `(…, d)` to `(…)`."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(-1) / norms


def attention_measures(attention: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """What one sentence's attention is like, as means over its query positions.

    The decoder's first position sees one token and has no choice: it counts in no measure of `decoder_attentions`,
    which are NaN if there is no other.

    Args:
        attention: `(steps, heads, queries, keys)`, of a `SentenceAttention`.
        kind: one of `KINDS`.

    Returns:
        Arrays `(steps, heads)`:

        - `entropy`: in bits.
        - `normalized_entropy`: each position's entropy by that of the uniform distribution over the keys that it
          sees: 0 is one token, 1 is all alike.
        - `diagonal_distance`: the mean distance of the attention from the diagonal, in keys. The diagonal of
          cross-attention goes from the first to the last token of both sides.
        - `eos_mass`: what goes to the last source token, in Marian the end of sentence; for `decoder_attentions`,
          which see none, `start_mass`: what goes to the start token.
        - `same_position_mass`: what goes to the query's own position; not for `cross_attentions`.

        and, between each step and the next, `step_cosine` `(steps - 1, heads)`, the cosine of the two distributions
        of the same head, and `mean_head_cosine` `(steps - 1,)`, that of the means over the heads. Only the latter
        compares steps whose heads were trained apart, as those of a vanilla model.
    """
    queries, keys = attention.shape[-2:]
    causal = kind == "decoder_attentions"
    rows = slice(1, None) if causal else slice(None)
    seen = np.arange(1, queries + 1) if causal else np.full(queries, keys)
    diagonal = np.linspace(0, keys - 1, queries)
    distances = np.abs(np.arange(keys) - diagonal[:, None])
    bits = entropy(attention)
    by_position = {
        "entropy": bits,
        # log2(1) is left out for the decoder; elsewhere a single key is all that there is.
        "normalized_entropy": bits / np.log2(np.maximum(seen, 2)),
        "diagonal_distance": (attention * distances).sum(-1),
        "start_mass" if causal else "eos_mass": attention[..., 0 if causal else -1],
    }
    if kind != "cross_attentions":
        by_position["same_position_mass"] = np.diagonal(attention, axis1=-2, axis2=-1)
    by_position["step_cosine"] = cosine(attention[:-1], attention[1:])
    heads_mean = attention.mean(1)
    by_position["mean_head_cosine"] = cosine(heads_mean[:-1], heads_mean[1:])
    return {name: _mean(values[..., rows]) for name, values in by_position.items()}


def hidden_state_measures(hidden_states: np.ndarray) -> dict[str, np.ndarray]:
    """How much each step changes one sentence's hidden states, as means over the positions.

    Args:
        hidden_states: `(steps + 1, positions, d_model)`, of a `SentenceAttention`.

    Returns:
        Arrays `(steps,)`: `cosine` between what the step starts from and what it makes of it, and `relative_change`,
        the norm of the difference by the norm of what it starts from. At a fixed point they are 1 and 0.
    """
    before, after = hidden_states[:-1], hidden_states[1:]
    change = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
    return {"cosine": _mean(cosine(before, after)), "relative_change": _mean(change)}


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis in double precision; NaN, without numpy's warning, if it is empty."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    return values.mean(-1, dtype=np.float64)


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear centred kernel alignment of two representations of the same n positions, debiased.

    1 if they are equal up to rotation and scale, about 0 if they have nothing in common (Kornblith et al. 2019); by
    the unbiased estimator of HSIC (Song et al. 2012), since the usual one nears 1 where n is not much larger than the
    width.

    Args:
        first: `(n, d)`.
        second: `(n, e)`.

    Raises:
        ValueError: other numbers of positions, or fewer than 4.
    """
    if len(first) != len(second) or len(first) < 4:
        raise ValueError(f"CKA needs the same positions on both sides, at least 4; got {len(first)} and {len(second)}")
    return _alignment(*(_gram(states) for states in (first, second)))


def _gram(states: np.ndarray) -> np.ndarray:
    states = states.astype(np.float64)
    states -= states.mean(0)  # for precision; the centring below does not need it
    return states @ states.T


def _alignment(first: np.ndarray, second: np.ndarray) -> float:
    first, second = _centre(first), _centre(second)
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def _centre(gram: np.ndarray) -> np.ndarray:
    """Gram matrix with zero diagonal whose rows sum to zero: the U-centring of the unbiased HSIC."""
    n = len(gram)
    gram = gram - np.diag(np.diag(gram))
    means = gram.sum(0) / (n - 2)
    gram += means.sum() / (n - 1) - means[:, None] - means
    np.fill_diagonal(gram, 0)
    return gram


@dataclass(frozen=True)
class Estimate:
    """Means over a corpus with the bounds of their 95% confidence intervals, three arrays of one shape."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Nested lists, `None` where there is no number."""
        return {name: _plain(getattr(self, name)) for name in ("mean", "low", "high")}


def _plain(values: np.ndarray) -> Any:
    if values.ndim:
        return [_plain(value) for value in values]
    return None if np.isnan(values) else float(values)


def bootstrap_mean(values: np.ndarray) -> Estimate:
    """The mean over the first axis, the sentences, with a percentile bootstrap; NaN in `values` do not count.

    Args:
        values: `(sentences, …)`.

    Returns:
        Arrays of the other axes' shape; the bounds are NaN for fewer than 20 sentences.
    """
    flat = values.reshape(len(values), -1)
    valid = ~np.isnan(flat)
    filled = np.where(valid, flat, 0)
    draws = np.random.default_rng(BOOTSTRAP_SEED).multinomial(
        len(values), np.full(len(values), 1 / len(values)), BOOTSTRAP_SAMPLES
    )
    with np.errstate(invalid="ignore"):
        mean = filled.sum(0) / valid.sum(0)
        low, high = np.percentile((draws @ filled) / (draws @ valid), [2.5, 97.5], axis=0)
    if len(values) < INTERVAL_SENTENCES:
        low = high = np.full_like(mean, np.nan)
    return Estimate(*(bound.reshape(values.shape[1:]) for bound in (mean, low, high)))


def jackknife_cka(states: np.ndarray) -> Estimate:
    """`linear_cka` of each entry of `states` and the next, with the interval of a delete-a-group jackknife.

    Args:
        states: `(steps + 1, n, d)`, at n positions that are independent of each other.

    Returns:
        Arrays `(steps,)`; NaN for fewer than 4 positions, the bounds for fewer than 20.
    """
    steps, n = len(states) - 1, states.shape[1]
    estimates = np.full((3, steps), np.nan)
    if n < 4:
        return Estimate(*estimates)
    groups = np.arange(n) % JACKKNIFE_GROUPS
    gram = _gram(states[0])
    for step in range(steps):
        following = _gram(states[step + 1])
        estimates[:, step] = _alignment(gram, following)
        half_width = np.nan
        if n >= JACKKNIFE_GROUPS:
            without = []
            for group in range(JACKKNIFE_GROUPS):
                kept = np.flatnonzero(groups != group)
                without.append(_alignment(*(matrix[np.ix_(kept, kept)] for matrix in (gram, following))))
            half_width = STUDENT_T * np.sqrt((JACKKNIFE_GROUPS - 1) * np.var(without))
        estimates[1:, step] += [-half_width, half_width]
        gram = following
    return Estimate(*estimates)
