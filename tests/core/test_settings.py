"""One declaration of a setting serves all front ends."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest

from sd_dejavu.core.settings import Checked, Option, named, of_page, of_text, option, options_of


@dataclass(frozen=True)
class Example(Checked):
    steps: int = option(10, "how many", minimum=1, maximum=100)
    learning_rate: float = option(0.5, "how fast", minimum=0, maximum=1, exclusive=True)
    floor: float = option(0.0, "from below", minimum=-1)
    ceiling: float = option(0.0, "from above", maximum=5)
    target: float | None = option(None, "aim", kind=float, minimum=0)
    way: str = option("up", "where to", choices=("up", "down"))
    loud: bool = option(False, "say more")
    title: str = option("", "what it is called")


def test_options_come_in_order_with_name_kind_and_range() -> None:
    found = options_of(Example)
    assert [o.name for o in found] == ["steps", "learning_rate", "floor", "ceiling", "target", "way", "loud", "title"]
    assert [o.kind for o in found] == [int, float, float, float, float, str, bool, str]
    assert found[0] == Option("steps", 10, "how many", int, 1, 100)
    assert found[5].choices == ("up", "down")
    assert Example() == Example(**{o.name: o.default for o in found})


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 1},
        {"steps": 100},
        {"learning_rate": 1e-9},
        {"learning_rate": 0.999},
        {"floor": -1, "ceiling": 5},
        {"target": None},
        {"target": 0},
        {"way": "down"},
    ],
)
def test_values_up_to_the_bounds_are_taken(values) -> None:
    assert {name: getattr(Example(**values), name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1 and at most 100, not 0"),
        ({"steps": 10**100}, f"steps must be at least 1 and at most 100, not 1{'0' * 59}"),
        ({"way": "x" * 1000}, f"way must be one of up, down, not '{'x' * 59}"),
        ({"steps": 101}, "steps must be at least 1 and at most 100, not 101"),
        ({"learning_rate": 0.0}, "learning rate must be above 0 and below 1, not 0.0"),
        ({"learning_rate": 1.0}, "learning rate must be above 0 and below 1, not 1.0"),
        ({"floor": -1.5}, "floor must be at least -1, not -1.5"),
        ({"ceiling": 5.5}, "ceiling must be at most 5, not 5.5"),
        ({"target": -1.0}, "target must be at least 0, not -1.0"),
        ({"target": math.nan}, "target must be a number, not nan"),
        ({"target": math.inf}, "target must be a number, not inf"),
        ({"floor": math.inf}, "floor must be a number, not inf"),
        ({"ceiling": -math.inf}, "ceiling must be a number, not -inf"),
        ({"steps": 10**12}, "steps must be at least 1 and at most 100, not 1000000000000"),
        ({"learning_rate": 1e-320}, f"learning rate must be at least 1e-09, not {1e-320}"),
        ({"learning_rate": 9.9e-10}, "learning rate must be at least 1e-09, not 9.9e-10"),
        ({"learning_rate": -1e-320}, f"learning rate must be above 0 and below 1, not {-1e-320}"),
        ({"learning_rate": "fast"}, "learning rate must be a number, not 'fast'"),
        ({"floor": None}, "floor must be a number, not None"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"way": "left"}, "way must be one of up, down, not 'left'"),
        ({"title": 5}, "title must be text, not 5"),
        ({"title": None}, "title must be text, not None"),
        ({"loud": "False"}, "loud must be true or false, not 'False'"),
        ({"loud": 1}, "loud must be true or false, not 1"),
    ],
)
def test_a_wrong_value_gives_a_sentence_with_the_setting_the_range_and_the_value(values, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Example(**values)


def test_a_whole_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^target must be a number, not 1000"):
        Example(target=10**400)


@pytest.mark.parametrize("name", ["steps", "learning_rate", "floor", "way", "loud", "title"])
def test_what_is_written_of_a_value_is_read_back(name: str) -> None:
    known = next(o for o in options_of(Example) if o.name == name)
    value = {"steps": 7, "loud": True, "title": "True"}.get(name, known.default)
    assert of_text(known, str(value)) == value
    for wrong in {"steps": ("7.0", "0", ""), "learning_rate": ("nan", "2"), "loud": ("true", "1")}.get(name, ()):
        with pytest.raises(ValueError, match=r"must be|invalid literal"):
            of_text(known, wrong)


def test_values_by_their_names_are_of_known_settings() -> None:
    options = options_of(Example)
    assert named({"steps": 7.0, "floor": 7.0, "title": None}, options, "this") == {
        "steps": 7,
        "floor": 7.0,
        "title": None,
    }
    assert [of_page(options[0], value) for value in (7.5, "7", None, True)] == [7.5, "7", None, True]
    with pytest.raises(ValueError, match=r"^this has no argument colour, size; it has steps, "):
        named({"size": 1, "colour": 2}, options, "this")
