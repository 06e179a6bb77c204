"""Does a configuration contradict the state that a run's data was saved in?

Called by the loader before it resumes. A state (`MultiCropLoader.state_dict`) holds the position
and everything that the order of samples depends on, as it was resolved at first launch; a setting
that says otherwise would silently train on other batches, so it is an error that names it.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UsageError

State = Mapping[str, Any]

_NO_SETTINGS = ("epoch", "step", "sources")


def check_form(state: State, num_sources: int) -> None:
    """Raise UsageError for a state that is not of so many data sets, or of another form."""
    if "streamed" in state:
        raise UsageError(
            f"the checkpoint was written while {state['streamed']} was streamed, which is no place "
            f"in a packed data set's order; start a new run under another checkpoint.run"
        )
    if "sources" not in state:
        raise UsageError(
            "the checkpoint is of a version of cropstream that wrote the loader's state otherwise; "
            "resume it with that version, or start a new run under another checkpoint.run"
        )
    if num_sources != len(state["sources"]):
        raise UsageError(
            f"the configuration names {num_sources} data set(s), but the checkpoint was written "
            f"with {len(state['sources'])}; set loader.dataset or loader.mix back, or start a new "
            f"run under another checkpoint.run"
        )


def check_settings(mine: State, state: State) -> None:
    """Raise UsageError for what `mine` says, other than 0, and the state does not."""
    for name in (name for name in mine if name not in _NO_SETTINGS):
        _check("train.seed" if name == "seed" else f"loader.{name}", mine[name], state[name])
    several = len(mine["sources"]) > 1
    for number, (my, its) in enumerate(zip(mine["sources"], state["sources"], strict=True)):
        for name, value in my.items():
            whose = several and name not in ("chunk", "window")
            _check(f"loader.mix[{number}].{name}" if whose else f"loader.{name}", value, its[name])


def _check(setting: str, asked: float, written: float) -> None:
    if asked and asked != written:
        raise UsageError(
            f"{setting} is {asked}, but the checkpoint was written with {written}; set it back, or "
            f"start a new run under another checkpoint.run"
        )
