"""How commands end."""

import pickle

import pytest

from pipeline import errors
from pipeline.errors import (
    ConfigError,
    CropstreamError,
    SampleError,
    StoreError,
    UsageError,
    run_command,
)


def fail(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code"), [(StoreError("no"), 1), (UsageError("no"), 2), (ConfigError("no"), 2)]
)
def test_our_errors_become_one_message_and_a_code(
    error: CropstreamError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: fail(error)) == code
    captured = capsys.readouterr()
    assert captured.err == "error: no\n"
    assert captured.out == ""


def test_results_pass_through() -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: fail(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    ours = {c.__name__ for c in classes if issubclass(c, CropstreamError)}
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in ours)


def test_sample_errors_carry_their_reason() -> None:
    error = SampleError("truncated", "at byte 7")
    assert (error.reason, str(error)) == ("truncated", "truncated: at byte 7")
    assert str(SampleError("bomb")) == "bomb"


def test_errors_cross_process_borders() -> None:
    assert str(pickle.loads(pickle.dumps(StoreError("no")))) == "no"
