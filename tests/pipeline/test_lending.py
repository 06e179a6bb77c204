"""Memory that comes back: never while anything of it is alive, always afterwards."""

import threading

import numpy as np
import pytest
import torch

from pipeline.lending import Lender

SHAPE = (2, 3, 4, 4, 3)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def crops_of(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).flatten(0, 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array[1:, 0],
        lambda array: array.reshape(-1)[5:].view(np.int32),
        crops_of,
        lambda array: crops_of(array)[3:4, 1],
        lambda array: crops_of(array).chunk(2)[1].detach(),
    ],
)
def test_memory_is_lent_again_when_the_last_view_is_gone(keep) -> None:
    lender = Lender()
    first = lender.lend(SHAPE)
    lent = address(first)
    view = keep(first)
    del first
    assert address(lender.lend(SHAPE)) != lent
    del view
    assert lent in {address(array) for array in (lender.lend(SHAPE), lender.lend(SHAPE))}


def test_what_autograd_saves_is_kept() -> None:
    lender = Lender()
    array = lender.lend(SHAPE)
    array[:] = 3.0
    weight = torch.ones((), requires_grad=True)
    loss = (crops_of(array) * weight).sum()
    del array
    for _ in range(3):
        lender.lend(SHAPE)[:] = 7.0
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.item() == 3.0 * np.prod(SHAPE)


def test_it_is_a_plain_array_of_its_shape() -> None:
    lender = Lender()
    for shape in (SHAPE, (1, 2, 3, 3, 3), SHAPE):
        array = lender.lend(shape)
        assert (type(array), array.dtype, array.shape) == (np.ndarray, np.float32, shape)
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_few_are_kept_however_many_were_out() -> None:
    lender = Lender()
    out = [lender.lend(SHAPE) for _ in range(20)]
    lent = {address(array) for array in out}
    assert len(lent) == 20
    held = out[:18]
    out.clear()
    held.clear()
    assert len(lender._free[SHAPE]) == 2


def test_threads_never_share_what_they_hold() -> None:
    lender, wrong = Lender(), []

    def use(number: int) -> None:
        for _ in range(300):
            tensor = torch.from_numpy(lender.lend((64,)))
            tensor.fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
