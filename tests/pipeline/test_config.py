"""TOML files, overrides, and all mistakes at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Gt
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import dump_config, load_config, parse_config
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Part:
    dataset: str
    weight: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Loader:
    dataset: str
    mix: tuple[Part, ...] = ()
    workers: Annotated[int, Gt(0)] = 2
    scale: tuple[float, float] = (0.14, 1.0)
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale runs backwards")


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: Annotated[float, Gt(0)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Config:
    loader: Loader
    optim: Optim = field(default_factory=Optim)


def write(folder: Path, text: str) -> str:
    path = folder / "config.toml"
    path.write_text(text)
    return str(path)


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, '[loader]\ndataset = "s3://a/b"\nworkers = 3\n')
    config = load_config(Config, path, ["loader.workers=5", "optim.lr=2", "loader.scale=[0.2,0.4]"])
    assert config == Config(
        loader=Loader(dataset="s3://a/b", workers=5, scale=(0.2, 0.4)), optim=Optim(lr=2.0)
    )


def test_a_word_needs_no_quotes() -> None:
    config = load_config(Config, None, ["loader.dataset=s3://bucket/prefix"])
    assert config.loader.dataset == "s3://bucket/prefix"


def test_all_mistakes_at_once() -> None:
    overrides = ["loader.workers=0", "loader.sufle=true", "optim.lr=nan", "nonsense", "a.b.c=1"]
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, overrides)
    message = str(caught.value)
    for name in (
        "loader.dataset",
        "loader.workers",
        "loader.sufle",
        "optim.lr",
        "nonsense",
        "a.b.c",
    ):
        assert name in message
    assert "shuffle" in message  # what was meant
    assert "6 mistake(s)" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loader.workers=2.5", "workers"),
        ("loader.workers=true", "workers"),
        ("loader.scale=[0.5]", "scale"),
        ("loader.scale=[0.9, 0.1]", "backwards"),
        ("loader.shuffle=1", "shuffle"),
        ("optim.lr=inf", "optim.lr"),
        ("optimizer.lr=0.1", "optimizer"),
    ],
)
def test_a_wrong_value(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(Config, None, ["loader.dataset=d", override])


def test_no_such_file() -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(Config, "nowhere.toml")


def test_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(Config, write(tmp_path, "[loader"))


@given(
    dataset=st.text(st.characters(codec="utf-8")),
    workers=st.integers(1, 10**9),
    scale=st.tuples(st.floats(0, 1), st.floats(1, 2)),
    shuffle=st.booleans(),
    lr=st.floats(1e-300, 1e300),
)
def test_dump_and_parse(
    dataset: str, workers: int, scale: tuple[float, float], shuffle: bool, lr: float
) -> None:
    loader = Loader(dataset=dataset, workers=workers, scale=scale, shuffle=shuffle)
    config = Config(loader=loader, optim=Optim(lr=lr))
    assert parse_config(Config, dump_config(config), where="here") == config


def test_tables_inside_a_section(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[loader]\ndataset = "a"\n[[loader.mix]]\ndataset = "b"\n'
        '[[loader.mix]]\ndataset = "c \\" d"\nweight = 3\n',
    )
    config = load_config(Config, path)
    assert config.loader.mix == (Part(dataset="b"), Part(dataset='c " d', weight=3.0))
    assert parse_config(Config, dump_config(config), where="here") == config
    override = 'loader.mix=[{dataset="e", weight=0.5}]'
    assert load_config(Config, path, [override]).loader.mix == (Part(dataset="e", weight=0.5),)


def test_mistakes_inside_a_table_are_named() -> None:
    override = 'loader.mix=[{dataset="a", wieght=2}, {weight=-1}]'
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, ["loader.dataset=x", override])
    message = str(caught.value)
    assert "loader.mix.0.wieght: unknown key; known here: dataset, weight" in message
    assert "loader.mix.1.dataset: missing" in message
    assert "loader.mix.1.weight" in message
