"""Column specifications: what they accept, that they survive JSON, and what they say when they refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_pnn.network import LSTM, ColumnSpec, Conv, Dense
from rllib_pnn.network.spec import MAX_LAYERS, MAX_WIDTH

ATARI = (Conv(12, 8, 4), Conv(12, 4, 2), Conv(12, 3, 1), Dense(256))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("atari", ATARI),
        ("pong", (Conv(8, 8, 4), Conv(16, 4, 2), Dense(256))),
        ("labyrinth", (*ATARI, LSTM(256))),
        ("mlp", (Dense(64), Dense(64))),
    ],
)
def test_presets_are_the_papers_columns(name: str, layers: tuple) -> None:
    spec = ColumnSpec.parse(name)
    assert spec.layers == layers
    assert spec.name == name
    assert ColumnSpec.parse(json.loads(json.dumps(spec.to_json()))) == spec
    assert ColumnSpec.parse(spec) is spec


def test_layers_as_a_yaml_file_gives_them() -> None:
    spec = ColumnSpec.parse(
        [
            {"conv": {"channels": 12, "kernel": 8, "stride": 4, "padding": 1}},
            {"conv": [6, 3]},
            {"dense": 32},
            {"lstm": 16},
        ]
    )
    assert spec.layers == (Conv(12, 8, 4, 1), Conv(6, 3, 1, 0), Dense(32), LSTM(16))
    assert (spec.is_recurrent, spec.name) == (True, "custom")
    assert [layer.width for layer in spec.layers] == [12, 6, 32, 16]
    assert not ColumnSpec.parse("atari").is_recurrent


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("atarri", ["unknown preset 'atarri'", "did you mean 'atari'"]),
        ([], ["at least one hidden layer"]),
        (None, ["expected a preset's name or a list of layers", "None"]),
        (7, ["expected a preset's name or a list of layers", "7"]),
        ({"layres": []}, ["expected a preset's name or a list of layers"]),
        ([{"dens": 3}], ["layer 1", "unknown kind 'dens'", "did you mean 'dense'"]),
        ([{"dense": 3, "lstm": 3}], ["layer 1", "expected one of conv, dense, lstm"]),
        (["dense"], ["layer 1", "expected one of conv, dense, lstm"]),
        ([{"dense": 3}, {"conv": [3, 3]}], ["layer 2", "can't stand above"]),
        ([{"dense": 0}], ["layer 1", "units", "from 1 to", "got 0"]),
        ([{"dense": MAX_WIDTH + 1}], ["layer 1", "units", str(MAX_WIDTH)]),
        ([{"dense": True}], ["layer 1", "units", "True"]),
        ([{"dense": 2.5}], ["layer 1", "units", "2.5"]),
        ([{"dense": {"units": "64"}}], ["layer 1", "units", "'64'"]),
        ([{"dense": {"unit": 64}}], ["layer 1", "dense", "unknown key 'unit'", "did you mean 'units'"]),
        ([{"conv": 12}], ["layer 1", "conv", "kernel"]),
        ([{"conv": [1, 2, 3, 4, 5]}], ["layer 1", "conv", "at most 4"]),
        ([{"conv": [3, 3, 1, -1]}], ["layer 1", "padding", "from 0 to", "-1"]),
        ([{"conv": {3: 3}}], ["layer 1", "conv", "unknown key 3"]),
        ([{"dense": 1}] * (MAX_LAYERS + 1), [f"at most {MAX_LAYERS} layers"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(value: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ColumnSpec.parse(value)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("column:") and "\n" not in message
    for word in words:
        assert word in message


def test_a_refused_value_is_not_repeated_at_length() -> None:
    with pytest.raises(ValueError) as caught:
        ColumnSpec.parse([{"dense": "x" * 10_000}])
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["conv", "dense", "lstm", "name", "layers", "units", "kernel"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_whatever_comes_gives_a_specification_or_a_value_error(value: object) -> None:
    try:
        spec = ColumnSpec.parse(value)  # type: ignore[arg-type]
    except ValueError as error:
        assert str(error).startswith("column:")
    else:
        assert ColumnSpec.parse(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_specification_may_be_made_as_it_is_parsed() -> None:
    for layers in ("atari", [{"dense": 8}, {"lstm": 4}]):
        assert ColumnSpec(layers) == ColumnSpec.parse(layers)
    assert ColumnSpec([{"dense": 8}], name="mine").name == "mine"
    with pytest.raises(ValueError, match="did you mean 'atari'"):
        ColumnSpec("atary")
