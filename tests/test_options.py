"""The options of the command line come from the records: no field without one, no help text written twice."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from revify import Method
from revify.finetuning import Recipe
from revify.methods import Options
from revify.option_fields import describe
from revify.options import make_parser

POSITIONAL = {"model"}


def options_of(command: str) -> dict[str, argparse.Action]:
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions}


@pytest.mark.parametrize("record", [Method, Recipe])
def test_the_docstring_describes_every_field_and_no_other(record: type) -> None:
    described = describe(record)
    assert [field.name for field in fields(record)] == list(described)
    assert all(field.text for field in described.values())


def test_every_field_of_a_recipe_is_an_option_of_finetune() -> None:
    options = options_of("finetune")
    assert {field.name for field in fields(Recipe)} <= options.keys()
    for field in fields(Recipe):
        if field.default is not MISSING and field.default not in (None, False, (), Path("runs/finetune")):
            assert "default" in (options[field.name].help or ""), field.name


@pytest.mark.parametrize("command", ["plan", "convert", "measure"])
def test_every_keyword_of_convert_is_an_option(command: str) -> None:
    options, described = options_of(command), describe(Method)
    for name in Options.__annotations__:
        assert options[name].help == described[name].help


def test_an_option_that_is_not_given_is_none_and_the_record_has_the_default() -> None:
    given = make_parser().parse_args(["finetune", "test_vit"])
    assert {name: value for name, value in vars(given).items() if value} == {"command": "finetune", "model": "test_vit"}


def test_words_become_the_values_of_the_fields() -> None:
    words = ["--bits", "auto", "--grid", "9", "--lr", ".1", "--scale", ".5", "1", "--bits-schedule", "1:2", "2:4"]
    given = make_parser().parse_args(["finetune", "test_vit", *words, "--resume", "--checkpoint", "a.pt"])
    assert (given.bits, given.grid, given.lr, given.scale) == ("auto", 9, 0.1, [0.5, 1.0])
    assert (given.bits_schedule, given.resume, given.checkpoint) == ([(1, 2), (2, 4)], True, Path("a.pt"))
