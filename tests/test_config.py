"Every setting of every record refuses what it cannot be, by its name."

import math
from dataclasses import fields

import pytest

from cola_tutorial.config import (
    ConfigError,
    DiTConfig,
    GenerationConfig,
    SpeedConfig,
    Stage1Config,
    Stage2Config,
    TraceConfig,
    VAEConfig,
)

# By the type of a field: values that no setting of that type may have.
WRONG = {
    bool: ["yes", 1, None, 0.0],
    int: [-1, 1.5, "1", True, math.nan],
    float: [math.nan, math.inf, -math.inf, 1e30, "1"],
    str: ["sideways", "", 3, None],
    tuple: ["1", 3, None, [None], [-1], [math.nan], [""], [[0.5]], [0.5, 0.7]],
}
CASES = [
    (record, field.name, value)
    for record in (VAEConfig, DiTConfig, Stage1Config, Stage2Config, GenerationConfig, SpeedConfig, TraceConfig)
    for field in fields(record)
    for value in WRONG[type(field.default) if field.default is not None else float]
]


@pytest.mark.parametrize("record, name, value", CASES, ids=str)
def test_what_cannot_be_is_named(record, name, value):
    with pytest.raises(ConfigError, match=f"^{name} is "):
        record(**{name: value})


LISTS = [
    ("times", [1, 0.25, 0], [[0.9, 0], [1, 0.1], [1, 0.5, 0.5, 0], [1, -0.5, 0], [1], [True, 0]]),
    ("guidance_schedule", [[1, 3], [0.2, 0]], [[[1]], [[1, 2, 3]], [[0.2, 1], [0.8, 1]], [[2, 1]], [[1, -1]], [[1, math.nan]], [1, 2]]),
    ("stop", ["a", "."], [["a", ""], [1]]),
    ("stop_tokens", [0, 7], [[-1], [1.0], [True], ["1"]]),
]


@pytest.mark.parametrize("name, good, bad", LISTS, ids=[name for name, _, _ in LISTS])
def test_lists_come_as_json_gives_them_and_are_refused_by_name(name, good, bad):
    config = GenerationConfig(**{name: good})
    frozen = tuple(tuple(part) if isinstance(part, list) else part for part in good)
    assert getattr(config, name) == frozen and hash(config) == hash(GenerationConfig(**{name: frozen}))
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{name} is "):
            GenerationConfig(**{name: value})
