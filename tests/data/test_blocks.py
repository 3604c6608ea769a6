"""Memory that is filled again: never while somebody holds it."""

import gc

import torch

from fastsnap.data.blocks import MOST_BLOCKS, Blocks


def test_what_is_held_is_never_given_out_again() -> None:
    blocks = Blocks()
    kept = [blocks.take(3, 4).fill_(number) for number in range(10)]
    assert len({tensor.data_ptr() for tensor in kept}) == 10
    for number, tensor in enumerate(kept):
        assert (tensor == number).all()


def test_what_is_dropped_is_filled_again_also_for_a_smaller_batch() -> None:
    blocks = Blocks()
    first = blocks.take(8, 4)
    address = first.data_ptr()
    del first
    second = blocks.take(5, 4)
    assert second.data_ptr() == address
    assert second.shape == (5, 4)
    assert second.is_contiguous()
    assert blocks.take(8, 4).data_ptr() != address


def test_a_view_keeps_the_memory_and_so_does_a_graph() -> None:
    blocks = Blocks()
    whole = blocks.take(4, 4).fill_(7)
    view = whole.permute(1, 0)[1:]
    weight = torch.ones(4, requires_grad=True)
    product = (blocks.take(4).fill_(3) * weight).sum()
    del whole
    gc.collect()
    others = [blocks.take(4, 4).fill_(0) for _ in range(6)]
    assert (view == 7).all()
    product.backward()
    assert weight.grad is not None
    assert (weight.grad == 3).all()
    assert all((other == 0).all() for other in others)


def test_not_more_than_a_few_blocks_wait() -> None:
    blocks = Blocks()
    many = [blocks.take(1000) for _ in range(3 * MOST_BLOCKS)]
    del many
    assert len(blocks._free) == MOST_BLOCKS


def test_tensors_outlive_the_one_that_gave_them_out() -> None:
    blocks = Blocks()
    tensor = blocks.take(10).fill_(5)
    del blocks
    gc.collect()
    assert (tensor == 5).all()
