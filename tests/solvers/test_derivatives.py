"""Switches of the whole process that derivatives of fused kernels need, and who sets them back."""

from __future__ import annotations

import threading

import torch

from deqfuse.solvers.derivatives import plain_kernels


def switches() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
    )


def test_threads_leave_the_switches_as_they_were() -> None:
    """The first thread in is the first one out, while the second one is still inside."""
    before, first_out, second_in = switches(), threading.Event(), threading.Event()
    assert any(before)

    def second() -> None:
        with plain_kernels():
            second_in.set()
            assert first_out.wait(10)
            assert not any(switches()), "the second thread is still inside"

    thread = threading.Thread(target=second)
    with plain_kernels():
        thread.start()
        assert second_in.wait(10)
    first_out.set()
    thread.join()
    assert switches() == before


def test_blocks_may_be_nested() -> None:
    before = switches()
    with plain_kernels():
        with plain_kernels():
            assert not any(switches())
        assert not any(switches())
    assert switches() == before
