"""One context at a time, always restored, and kept by recomputed functions."""

import pytest

from megatron_hbp.model import context as micro_batch
from megatron_hbp.model.context import MicroBatchContext, bind, capture_context, current, is_bound, on_bind
from tests.unit.model.packs import context_of

A, B = context_of([3]), context_of([4])


def test_bound_inside_only():
    assert not is_bound()
    with bind(A):
        assert is_bound() and current() is A
    assert not is_bound()
    with pytest.raises(AssertionError, match="no micro-batch is bound"):
        current()


def test_nested_bindings_restore_the_outer_one():
    with bind(A):
        with bind(B):
            assert current() is B
        assert current() is A


@pytest.mark.parametrize("depth", [1, 2])
def test_restored_after_an_error(depth):
    def fail(left):
        with bind(B):
            if left > 1:
                fail(left - 1)
            raise RuntimeError("forward failed")

    with bind(A):
        with pytest.raises(RuntimeError, match="forward failed"):
            fail(depth)
        assert current() is A
    with pytest.raises(RuntimeError, match="forward failed"):
        fail(depth)
    assert not is_bound()


def test_callbacks_see_every_context_that_becomes_current():
    seen: list[MicroBatchContext | None] = []
    with on_bind(seen.append):
        with bind(A), bind(B):
            pass
        assert seen == [A, B, A]  # the restored one too: its recompute policy must come back
    with bind(B):
        pass
    assert seen == [A, B, A]


def test_callbacks_leave_on_an_error():
    with pytest.raises(RuntimeError), on_bind(lambda context: None):
        raise RuntimeError
    assert not micro_batch._on_bind


def test_capture_binds_the_context_of_the_forward_again():
    seen = []

    def layer(x, *, scale):
        seen.append(current())
        return x * scale

    with bind(A):
        captured = capture_context(layer)
    switched: list[MicroBatchContext | None] = []
    with on_bind(switched.append):
        with bind(B):  # 1F1B: another micro-batch is current when the backward recomputes
            assert captured(3, scale=2) == 6
            assert current() is B
        assert captured(1, scale=1) == 1  # and after the last one none is
        assert not is_bound()
    assert seen == [A, A]
    assert switched == [B, A, B, A]
    assert captured.__name__ == "layer"


def test_capture_restores_after_an_error():
    def fail():
        raise RuntimeError("recompute failed")

    with bind(A):
        captured = capture_context(fail)
    with bind(B):
        with pytest.raises(RuntimeError, match="recompute failed"):
            captured()
        assert current() is B


def test_capture_inside_its_own_context_switches_nothing():
    switched: list[MicroBatchContext | None] = []
    with bind(A), on_bind(switched.append):
        assert capture_context(current)() is A
    assert switched == []


def test_capture_without_a_context_is_the_function_itself():
    def plain():
        return 1

    assert capture_context(plain) is plain
