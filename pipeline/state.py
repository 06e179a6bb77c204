"""Does a configuration contradict the state that a run's data was saved in?

Called by the loader before it resumes. A state (`MultiCropLoader.state_dict`) holds the position
and everything that the order of samples depends on, as it was resolved at first launch; a setting
that says otherwise would silently train on other batches, so it is an error that names it. A data
set is known by the attempt that committed its snapshot, which a copy elsewhere keeps.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UsageError

State = Mapping[str, Any]

_KEYS = ("seed", "epoch", "step", "global_batch", "lanes", "sources")
_SOURCE_KEYS = (
    *("dataset", "attempt", "version"),
    *("num_samples", "chunk", "window", "weight"),
)
_NO_SETTINGS = ("epoch", "step", "sources", "dataset", "attempt")
_MAY_BE_OPEN = ("lanes", "chunk", "window", "version")  # 0 leaves the choice to the state


def check_form(state: State, num_sources: int) -> None:
    """Raise UsageError for a state that is not of so many data sets, or of another form."""
    if "streamed" in state:
        raise UsageError(
            f"the checkpoint was written while {state['streamed']} was streamed, which is no place "
            f"in a packed data set's order; start a new run under another checkpoint.run"
        )
    missing = [name for name in _KEYS if name not in state]
    for source in state.get("sources", ()):
        missing += [f"{name} of sources" for name in _SOURCE_KEYS if name not in source]
    if missing:
        raise UsageError(
            "the checkpoint is of a version of cropstream that wrote the loader's state otherwise, "
            f"without {', '.join(dict.fromkeys(missing))}; resume it with that version, or start "
            "a new run under another checkpoint.run"
        )
    if num_sources != len(state["sources"]):
        raise UsageError(
            f"the configuration names {num_sources} data set(s), but the checkpoint was written "
            f"with {len(state['sources'])}; set loader.dataset or loader.mix back, or start a new "
            f"run under another checkpoint.run"
        )


def check_settings(mine: State, state: State) -> None:
    """Raise UsageError for what `mine` says and the state does not.

    `mine` may lack what is not known yet; its lanes, chunk, window and version may be 0, for open.
    """
    _check(mine, state, {"seed": "train.seed"})
    several = len(mine["sources"]) > 1
    for number, (my, its) in enumerate(zip(mine["sources"], state["sources"], strict=True)):
        part = f"loader.mix[{number}]" if several else "loader"
        if "attempt" in my:
            _check_data_set(f"{part}.dataset", my, its)
        _check(my, its, {name: f"{part}.{name}" for name in ("version", "num_samples", "weight")})


def _check(mine: State, state: State, settings: Mapping[str, str]) -> None:
    """Compare what are settings. `settings`: those that are not called loader.name."""
    for name, asked in mine.items():
        is_open = name in _MAY_BE_OPEN and not asked
        if name not in _NO_SETTINGS and not is_open and asked != state[name]:
            raise UsageError(
                f"{settings.get(name, f'loader.{name}')} is {asked}, but the checkpoint was "
                f"written with {state[name]}; set it back, or start a new run under another "
                f"checkpoint.run"
            )


def _check_data_set(setting: str, mine: State, its: State) -> None:
    if mine["version"] == its["version"] and mine["attempt"] != its["attempt"]:
        raise UsageError(
            f"{setting} is {mine['dataset']}, but the checkpoint was written with another data set "
            f"({its['dataset']}): its version {its['version']} was committed as {its['attempt']}, "
            f"yours as {mine['attempt']}; set it back, to that one or a copy of it, or start a new "
            f"run under another checkpoint.run"
        )
