"Every setting of every record refuses what it cannot be, by its name."

import math
from dataclasses import fields

import pytest

from cola_tutorial.config import ConfigError, DiTConfig, GenerationConfig, Stage1Config, Stage2Config, VAEConfig

# By the type of a field: values that no setting of that type may have.
WRONG = {
    bool: ["yes", 1, None, 0.0],
    int: [-1, 1.5, "1", True, math.nan],
    float: [math.nan, math.inf, -math.inf, 1e30, "1"],
    str: ["sideways", "", 3, None],
}
CASES = [
    (record, field.name, value)
    for record in (VAEConfig, DiTConfig, Stage1Config, Stage2Config, GenerationConfig)
    for field in fields(record)
    for value in WRONG[type(field.default) if field.default is not None else float]
]


@pytest.mark.parametrize("record, name, value", CASES, ids=str)
def test_what_cannot_be_is_named(record, name, value):
    with pytest.raises(ConfigError, match=f"^{name} is "):
        record(**{name: value})
