"""From logits to figures: the true tokens' log-probabilities, divergence from a base, and their means with errors.

Definitions are llama-perplexity's (llama.cpp tools/perplexity/perplexity.cpp).
"""

from dataclasses import dataclass

import numpy as np

PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
_CUT_OFF = -16.0  # nats: llama-perplexity leaves out what the base thinks less likely


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Against:
    """A model compared with its base, over the same tokens. KLD in nats; percentiles by percent.

    ratio: PPL / PPL of the base, its error with the covariance of both. dp: change of the true token's probability, in
    percent. same_top: share of tokens whose likeliest successor is the same, in percent.
    """

    base: str
    ppl_base: Estimate
    ratio: Estimate
    correlation: float
    kld: Estimate
    kld_max: float
    kld_percentiles: dict[float, float]
    dp: Estimate
    dp_rms: Estimate
    dp_percentiles: dict[float, float]
    same_top: Estimate


class Scores:
    """Of every scored token, (n_chunks, n): nll in nats, the likeliest successor, and against a base kld in nats."""

    def __init__(self, n_chunks: int, n: int):
        self.nll = np.empty((n_chunks, n))
        self.top = np.empty((n_chunks, n), np.int64)
        self.kld = np.empty((n_chunks, n))

    def put(self, chunk: int, rows: slice, logits: np.ndarray, targets: np.ndarray, base: np.ndarray | None = None) -> None:
        """Logits (n, n_vocab) of the positions before `targets` (n,); base: the base's log-probabilities at the same."""
        self.top[chunk, rows] = logits.argmax(1)
        log_sum = log_sum_exp(logits)
        self.nll[chunk, rows] = log_sum - logits[np.arange(len(logits)), targets]
        if base is not None:
            p = np.exp(base)
            p[base <= _CUT_OFF] = 0
            # Σ p (log p − log q), log q = logit − log Σ exp: the small differences are summed, not their large parts
            apart = base - logits
            apart += log_sum[:, None].astype(np.float32)
            self.kld[chunk, rows] = np.einsum("ij,ij->i", p, apart)

    def put_known(self, chunk: int, rows: slice, log_probs: np.ndarray, targets: np.ndarray) -> None:
        """The base's, which are known as log-probabilities."""
        self.top[chunk, rows] = log_probs.argmax(1)
        self.nll[chunk, rows] = -log_probs[np.arange(len(log_probs)), targets]

    def perplexity(self) -> Estimate:
        return _perplexity(self.nll.ravel())


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(n,) float64 of (n, n_vocab) float32."""
    highest = logits.max(1, keepdims=True)
    return highest[:, 0] + np.log(np.exp(logits - highest).sum(1, dtype=np.float64))


def _perplexity(nll: np.ndarray) -> Estimate:
    log_ppl = _mean(nll)
    ppl = float(np.exp(log_ppl.value))
    return Estimate(ppl, ppl * log_ppl.error)


def against(scores: Scores, name: str, base: Scores) -> Against:
    """A model's scores beside those of its base, which is called `name`."""
    nll, nll_base, kld = scores.nll.ravel(), base.nll.ravel(), scores.kld.ravel()
    log_ppl, log_base = _mean(nll), _mean(nll_base)
    covariance = float((nll * nll_base).mean() - nll.mean() * nll_base.mean()) / (len(nll) - 1)
    ratio = float(np.exp(log_ppl.value - log_base.value))
    variance = log_ppl.error**2 + log_base.error**2 - 2 * covariance
    both = log_ppl.error * log_base.error
    dp = 100 * (np.exp(-nll) - np.exp(-nll_base))
    same = float((scores.top == base.top).mean())
    squares = _mean(dp**2)
    rms = float(np.sqrt(squares.value))
    return Against(
        base=name,
        ppl_base=_perplexity(nll_base),
        ratio=Estimate(ratio, ratio * float(np.sqrt(max(0.0, variance)))),
        correlation=covariance / both if both else 1.0,
        kld=_mean(kld),
        kld_max=float(kld.max()),
        kld_percentiles=_percentiles(kld),
        dp=_mean(dp),
        dp_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        dp_percentiles=_percentiles(dp),
        same_top=Estimate(100 * same, 100 * float(np.sqrt(same * (1 - same) / (len(nll) - 1)))),
    )


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(np.sqrt(values.var() / (len(values) - 1))))


def _percentiles(values: np.ndarray) -> dict[float, float]:
    return {p: float(np.percentile(values, p)) for p in PERCENTILES}
