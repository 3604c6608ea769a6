"""Random ensembles, and one comparison with the fp64 reference: shared by the tests of all averaging kernels."""

from typing import Any

import torch
from hypothesis import strategies
from torch import Tensor

from fastsnap.kernels.averaging_reference import EnsembleStatistics, reference_averaging

# |got - fp64| <= 1e-6 * (1 + |fp64|); mutual information is a difference of two entropies, each that exact.
TOLERANCES = {"mutual_information": 4e-6}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@strategies.composite
def cases(draw: Any, most_classes: int) -> dict[str, Any]:
    """Arguments of a kernel: any dtype and strides, few and many members, samples and classes."""
    members, samples = draw(strategies.integers(1, 7)), draw(strategies.integers(0, 20))
    classes = draw(strategies.one_of(strategies.integers(2, 20), strategies.integers(2, most_classes)))
    torch.manual_seed(draw(strategies.integers(0, 1000)))
    spread = draw(strategies.sampled_from([0.1, 3.0, 30.0, 1e4]))
    dtype = draw(strategies.sampled_from(DTYPES))
    offsets = [0.0, 1e4] if dtype == torch.float16 else [0.0, 1e4, -1e8, 1e12]
    offset = draw(strategies.sampled_from(offsets))
    permutation = draw(strategies.permutations([0, 1, 2]))
    sizes = [(members, samples, classes)[axis] for axis in permutation]
    inverse = [permutation.index(axis) for axis in range(3)]
    exact = torch.randn(sizes, dtype=torch.float64) * spread
    logits = (exact.clamp(-3e4, 3e4) + offset).to(dtype).permute(inverse)
    joining = draw(strategies.permutations(range(members)))
    return {
        "logits": logits,
        "labels": torch.randint(classes, (samples,)) if draw(strategies.booleans()) else None,
        "joining": joining,
        "weights_M": draw(weights(members)),
        "temperature": draw(strategies.sampled_from([1.0, 0.5, 0.7, 3.0, 1e-30, 1e30])),
        "probabilities": draw(strategies.booleans()),
    }


def large_cases() -> list[dict[str, Any]]:
    """ImageNet-21k, small and large logits, those that are large and yet close to each other, and 64 members."""
    torch.manual_seed(0)
    sizes = [(2, 3, 21_841, 0.0, 4.0, 1.0), (2, 3, 21_841, 0.0, 30.0, 0.7), (3, 2, 21_841, 0.0, 0.01, 1.0)]
    sizes += [(2, 2, 21_841, 0.0, 1e4, 0.7), (64, 5, 10, 0.0, 4.0, 1.0), (64, 5, 2, 0.0, 1e4, 0.7)]
    sizes += [(3, 20, 30, 1e4, 1.0, 0.7)]
    return [
        {
            "logits": torch.randn(members, samples, classes) * spread + centre,
            "labels": torch.randint(classes, (samples,)),
            "joining": list(range(members)),
            "weights_M": [1.0] * members,
            "temperature": temperature,
            "probabilities": True,
        }
        for members, samples, classes, centre, spread, temperature in sizes
    ]


def weights(members: int) -> strategies.SearchStrategy[list[float]]:
    """Equal, of the same size, or of very different sizes, which may all be beyond the range of fp32."""
    numbers = strategies.floats(0.1, 1.0)
    scales = strategies.sampled_from([1e-15, 1.0, 1e15])
    uneven = strategies.builds(lambda number, scale: number * scale, numbers, scales)
    unit = strategies.sampled_from([1e-200, 1.0, 1e200])
    return strategies.one_of(
        strategies.just([1.0] * members),
        strategies.lists(numbers, min_size=members, max_size=members),
        strategies.builds(
            lambda factors, unit: [factor * unit for factor in factors],
            strategies.lists(uneven, min_size=members, max_size=members),
            unit,
        ),
    )


def check_against_float64(case: dict[str, Any], got: EnsembleStatistics, invalid_M: Tensor) -> None:
    exact, _ = reference_averaging(**case)
    assert not invalid_M.any()
    assert (got.probabilities is None) == (not case["probabilities"])
    for name in (*("confidence", "sum_of_squares", "entropy", "mutual_information"), "label_log_probability"):
        _check(name, getattr(got, name), getattr(exact, name))
    _check("probabilities", got.probabilities, exact.probabilities)
    # Averages that differ by less than a rounding may come out in another order, and then rank differently.
    decided, rank_decided = _decided(case)
    assert torch.equal(got.prediction[decided], exact.prediction[decided])
    assert torch.equal(got.disagreement[decided].long(), exact.disagreement[decided].long())
    if rank_decided is not None:
        assert torch.equal(got.label_rank[rank_decided], exact.label_rank[rank_decided])


def _check(name: str, got: Tensor | None, exact: Tensor | None) -> None:
    assert (got is None) == (exact is None), name
    if got is not None and exact is not None:
        tolerance = TOLERANCES.get(name, 1e-6)
        torch.testing.assert_close(
            got.double(), exact, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


def _decided(case: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """[M, N], where roundings cannot change the most probable class and the members' votes, and where they cannot
    change the label's rank: averaged probabilities lie more than 1e-6 apart, relative to the larger one.
    """
    logits_MNC = case["logits"].double()[case["joining"]]
    logits_MNC = (logits_MNC - logits_MNC.amax(2, keepdim=True)) / case["temperature"]
    log_weights_M11 = torch.tensor(case["weights_M"], dtype=torch.float64, device=logits_MNC.device).log()[
        :, None, None
    ]
    log_sums_MNC = (logits_MNC.log_softmax(2) + log_weights_M11).logcumsumexp(0)
    best_MN2, votes_MN2 = log_sums_MNC.topk(2, 2).values, logits_MNC.topk(2, 2).values
    clear_MN, votes_MN = (values[:, :, 0] - values[:, :, 1] > 2e-6 for values in (best_MN2, votes_MN2))
    decided_MN = clear_MN & votes_MN.all(0)
    if case["labels"] is None:
        return decided_MN, None
    label_1N1 = case["labels"][None, :, None].expand(len(logits_MNC), -1, 1)
    distances_MNC = (log_sums_MNC - log_sums_MNC.gather(2, label_1N1)).abs()
    return decided_MN, distances_MNC.scatter(2, label_1N1, torch.inf).amin(2) > 2e-6
