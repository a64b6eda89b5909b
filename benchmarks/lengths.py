"""Sample lengths like those of public data sets, seeded. For benchmarks and tests: the data are not needed.

Shapes are chosen to meet published facts (dataset cards and the paper's section 4), which the tests assert:

    tulu3      Tulu-3 SFT mixture: 939,343 samples, mean about 714, 5% above 2,048, at most 32K
    longcite   LongCite-45k: histogram of 676 samples, median 23.7K
    longwriter LongWriter-6k: 6,000 samples, mean 5,009, standard deviation 2,933, 117 to 30,354
    openhermes OpenHermes-2.5: about a million samples, mean about 390
    chatqa2    ChatQA2-long: 21.9% below 1K, 31.5% below 4K, 40.4% below 8K, 99.9% below 32K, at most 99K
    lmsys      LMSys-Chat: 87.1% below 1K, 99.4% below 4K, a tail to 1.6M
"""

from collections.abc import Callable

import numpy as np

from megatron_hbp.errors import ConfigError

_K = 1024


def tulu3(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Short instructions, worked mathematics and code, and long chats, each a lognormal: int64 [num_samples]."""
    medians, sigmas = np.array([230.0, 700.0, 1100.0]), np.array([0.85, 0.5, 1.0])
    kind = rng.choice(3, num_samples, p=[0.44, 0.42, 0.14])
    return _lognormal(medians[kind], sigmas[kind], 16, 32 * _K, rng)


def longcite(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Published histogram, log-uniform inside a bin, cut at 128K: int64 [num_samples]."""
    edges = _K * np.array([4, 8, 16, 32, 64, 128])
    return _histogram(edges, np.array([26, 204, 175, 151, 102]), num_samples, rng)


def longwriter(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """A gamma distribution of the published mean and deviation: int64 [num_samples]."""
    shape = (5009 / 2933) ** 2
    return np.clip(np.rint(rng.gamma(shape, 5009 / shape, num_samples)), 117, 30354).astype(np.int64)


def openhermes(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """A lognormal of mean 390: int64 [num_samples]."""
    sigma = 0.8
    median = np.full(num_samples, 390 / np.exp(sigma**2 / 2))
    return _lognormal(median, np.full(num_samples, sigma), 16, 16 * _K, rng)


def chatqa2(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Published quantiles, log-uniform between them: int64 [num_samples]."""
    edges = _K * np.array([0.0625, 1, 4, 8, 32, 99])
    return _histogram(edges, np.array([21.9, 9.6, 8.9, 59.5, 0.1]), num_samples, rng)


def lmsys(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Published quantiles, log-uniform between them: int64 [num_samples]."""
    edges = _K * np.array([0.0625, 1, 4, 16, 1600])
    return _histogram(edges, np.array([87.1, 12.3, 0.59, 0.01]), num_samples, rng)


def mix(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Tulu-3 with the paper's share of LongCite (2,000 in 941,343): int64 [num_samples], shuffled."""
    num_long = round(num_samples * 2000 / 941343)
    parts = tulu3(num_samples - num_long, rng), longcite(num_long, rng)
    return rng.permutation(np.concatenate(parts))


GENERATORS: dict[str, tuple[Callable[[int, np.random.Generator], np.ndarray], int]] = {
    "tulu3": (tulu3, 939_343),
    "longcite": (longcite, 45_000),
    "longwriter": (longwriter, 6_000),
    "openhermes": (openhermes, 1_000_000),
    "chatqa2": (chatqa2, 100_000),
    "lmsys": (lmsys, 1_000_000),
    "mix": (mix, 941_343),
}
"""Name -> (generator, samples of the real data set)."""


def generate(name: str, *, seed: int = 0, num_samples: int | None = None) -> np.ndarray:
    """Lengths like those of data set `name`: int64 [num_samples]. Raises ConfigError for an unknown name."""
    if name not in GENERATORS:
        raise ConfigError(f"unknown data set {name!r}; there are {', '.join(GENERATORS)}")
    generator, real_size = GENERATORS[name]
    return generator(num_samples or real_size, np.random.default_rng(seed))


def _lognormal(
    medians: np.ndarray, sigmas: np.ndarray, shortest: int, longest: int, rng: np.random.Generator
) -> np.ndarray:
    draws = medians * np.exp(sigmas * rng.standard_normal(len(medians)))
    return np.clip(np.rint(draws), shortest, longest).astype(np.int64)


def _histogram(edges: np.ndarray, weights: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Bins [edges[i], edges[i + 1]) with `weights`, log-uniform inside."""
    bins = rng.choice(len(weights), num_samples, p=weights / weights.sum())
    low, high = edges[bins], edges[bins + 1]
    return np.floor(low * (high / low) ** rng.random(num_samples)).astype(np.int64)
