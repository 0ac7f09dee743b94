"""The latency benchmark: the products of its chain, its turns, its table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import latency
from benchmarks.cases import Case, build
from benchmarks.variants import Answer, fastest_backend

CASE = Case("tiny", 3, 2, 16)


def test_the_chain_has_the_products_of_the_slowest_row() -> None:
    """Blocks of 4 and 6 and 3 evaluations, the first of each free; and the gate's constant."""
    nfe = torch.tensor([[4, 2, 1], [5, 6, 6]])
    answer = Answer(torch.empty(0), torch.empty(0), nfe, torch.tensor([1, 3, 2]))
    assert latency.products(CASE, answer) == 2 * (3 + 5 + 2) + 1


@pytest.mark.filterwarnings("ignore")
def test_every_call_is_a_sample_and_all_variants_answer() -> None:
    threads = torch.get_num_threads()
    samples, facts = latency.measure(CASE, 1, 0.0, full=False)
    assert torch.get_num_threads() == threads
    assert {fastest_backend(), latency.PREPARED, latency.CHAIN} <= set(samples)
    counts = {len(taken) for taken in samples.values()}
    assert counts == {latency.FEWEST_TURNS * latency.VISIT}
    assert min(facts.values()) > 0
    assert facts["bytes"] == 4 * facts["products"] * CASE.dim**2


def test_the_prepared_layer_is_that_of_the_problem() -> None:
    problem = build(CASE)
    with torch.no_grad():
        calls, answer = latency.contenders(problem, full=False)
        assert torch.equal(calls[latency.PREPARED](), answer.z)


def test_quantiles_are_samples() -> None:
    assert latency.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert latency.quantile([float(i) for i in range(200)], 0.99) == 198.0
    assert latency.quantile([5.0], 0.99) == 5.0
