"""Few rows, which the C++ backend lays out feature by feature: the bits of a batch of 1000."""

from __future__ import annotations

import os
import subprocess
import sys

import few_rows_cases
import pytest
import torch
from cpu_cases import assert_equal
from few_rows_cases import COUNTS, Few, bits, cases, differing, parts, rows_of

from deqfuse.backends import cpu_native, load, presence
from deqfuse.backends.maps import VARIANTS


@pytest.mark.parametrize("case", cases(), ids=str)
def test_few_rows_have_the_bits_of_a_batch_of_1000(case: Few) -> None:
    assert differing(case) == []


@pytest.mark.parametrize("count", [2, 3])
def test_threads_that_share_few_rows_change_nothing(count: int, threads) -> None:
    """Wide enough to be worth sharing: rows of one block then go to several threads."""
    threads(count)
    for extra in ("", "present"):
        assert differing(Few(130, 5, n=1, extra=extra)) == []


# The narrow ones are slow; only vnni has integers, in segments of 256 features.
@pytest.mark.parametrize(
    ("isa", "most"), [("base", 35), ("avx2", 35), ("avx512", 65), ("vnni", 300)]
)
def test_every_instruction_set(isa: str, most: int) -> None:
    """This process runs one of them; the others are asked in processes of their own."""
    assert cpu_native.module is not None
    if cpu_native.module.build_info()["instruction_set"] == isa:
        pytest.skip(f"DEQFUSE_ISA={isa}: the other tests of this file run it")
    run = subprocess.run(
        [sys.executable, few_rows_cases.__file__, str(most)],
        env={**os.environ, "DEQFUSE_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    used, _, failures = run.stdout.partition("\n")
    if used != isa:
        pytest.skip(f"DEQFUSE_ISA={isa}: this processor gets {used}")
    assert failures.strip() == ""


# ---- prepared parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(), ids=str)
@torch.no_grad()
def test_prepared_parameters_give_the_same_bits(case: Few) -> None:
    """Also for more rows than have a layout of their own. Neither starts nor masks are taken."""
    if case.extra in ("mask", "warm"):
        pytest.skip("a prepared layer takes no mask and no start")
    layer, rows = case.layer(), rows_of(case)
    how = layer.num_groups, VARIANTS[layer.variant], layer.solver.settled(rescue=False)
    params = layer._equations().flat()
    prepared = presence.prepared(load("cpu"), params, *how)
    general = presence.whole(load("cpu")).solve
    for part in (*parts(COUNTS), slice(0, 70), slice(3, 3)):
        x, present = (
            None if t is None else t[..., part, :].contiguous()
            for t in (rows["x"], rows["present"])
        )
        assert x is not None
        expected = general(list(x), params, None, None, None, present, *how)
        given = prepared(list(x), present)
        assert_equal([bits(t) for t in given[:6]], [bits(t) for t in expected[:6]])


def test_a_prepared_layer_of_other_sizes_is_refused() -> None:
    layer = Few(12, 4).layer()
    numbers = 4, False, False, 1e-4, 20, 5, 1.0, 1e-6
    prepared, addresses = cpu_native.prepare_layer(layer._equations().flat(), *numbers)
    x = [torch.randn(1, 16), torch.randn(1, 16)]
    with pytest.raises(RuntimeError, match="prepared: expected what cpu_prepare_layer made"):
        cpu_native.solve_prepared(x, prepared, addresses, None, *numbers, 0)
    with pytest.raises(RuntimeError, match="addresses: expected those of a layer of 1 modalities"):
        cpu_native.solve_prepared(x[:1], prepared, addresses, None, *numbers, 0)


def test_what_is_prepared_holds_a_copy_in_panels_and_one_in_integers() -> None:
    """The bound that deqfuse.nn.PreparedFusion documents."""
    layer = Few(300, 4).layer()
    numbers = 4, False, False, 1e-4, 20, 5, 1.0, 1e-6
    prepared, _ = cpu_native.prepare_layer(layer._equations().flat(), *numbers)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert prepared.numel() <= 1.7 * matrices
