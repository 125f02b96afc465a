"""What is asked of a conversion: one record, checked when it is made, that knows its defaults and what goes with what."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest
import torch
import zoo

import revify
from revify import Method, RevifyError, couplings, presets
from revify.methods import Options
from revify.words import CALIBRATED, FIXED, SIGNS, PredictorName, SignName


@pytest.mark.parametrize(
    ("said", "bits", "sign"),
    [
        ({}, 8, "balanced"),  # a coded step
        ({"step": "recurrence"}, 4, "balanced"),
        ({"grid": 12}, 4, "balanced"),
        ({"bits": 0}, 0, "positive"),
        ({"bits": 2}, 2, "balanced"),
        ({"predictor": "midpoint"}, 4, "positive"),
        ({"predictor": "midpoint", "sign": "random"}, 4, "random"),
        ({"sign": "positive"}, 4, "positive"),
        ({"predictor": "linear", "bits": 1}, 4, "positive"),  # a calibration puts its own bits in place
        ({"bits": "auto"}, 4, "positive"),
        ({"streams": "split"}, 4, "positive"),
    ],
)
def test_what_is_not_said_goes_with_the_rest(said: Options, bits: int, sign: str) -> None:
    method = Method(**said)
    assert (method.first_bits, method.first_sign) == (bits, sign)
    assert method.first_predictor == (said.get("predictor") if said.get("predictor") in FIXED else "identity")


def test_with_images_predictors_and_bits_are_fitted_unless_something_else_is_said() -> None:
    assert Method().settled(with_images=True) == Method(predictor="auto", bits="auto")
    assert Method(bits=2, sign="random").settled(with_images=True) == Method(predictor="auto", bits=2, sign="random")
    assert Method(bits=2).settled(with_images=False) == Method(bits=2)
    for fitted in (Method(predictor="linear"), Method(bits="auto")):
        with pytest.raises(RevifyError, match=r"this is fitted on images\. Pass some"):
            fitted.settled(with_images=False)


def test_keywords_go_before_the_method_and_change_what_follows_from_them() -> None:
    method = Method.of(Method(bits=2), predictor="midpoint", grid=None)
    assert (method.first_predictor, method.first_bits, method.first_sign) == ("midpoint", 2, "positive")
    model = zoo.PreNormBlocks()
    plan = revify.plan(model, model.example(), method=presets.dr2net, grid=10)
    stage = plan.stages[0]
    assert (plan.grid, stage.predictor, stage.bits, stage.sign) == (10, "zero", 3, "positive")


@pytest.mark.parametrize("method", [presets.revvit, presets.bdia, presets.revnet, Method(grid=9, transitions="keep")])
def test_a_method_and_its_keywords_ask_for_the_same(method: Method) -> None:
    model = zoo.PreNormBlocks()
    assert revify.plan(model, model.example(), method=method) == revify.plan(model, model.example(), **method.options)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"step": "magic"}, "step='magic' is not known: choose"),
        ({"predictor": "identity", "bits": "auto"}, "predictor='identity' cannot be calibrated: choose auto, diagonal"),
        ({"predictor": "linear", "unit": "branch"}, "predictors are fitted to whole blocks"),
        ({"bits": "auto", "sign": "balanced"}, "is for fixed predictors"),
        ({"streams": "split", "predictor": "linear"}, "no predictor to calibrate"),
        ({"streams": "split", "bits": 4}, "are for full streams"),
        ({"coupling": couplings.additive}, 'coupling= is for streams="split"'),
    ],
)
def test_what_does_not_go_together(said: Options, message: str) -> None:
    with pytest.raises(RevifyError) as caught:
        Method(**said)
    assert message in str(caught.value)


def test_a_method_is_frozen_and_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(FrozenInstanceError):
        Method().bits = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="bitz"):
        revify.convert(zoo.PreNormBlocks(), torch.zeros(zoo.TOKENS), bitz=2)


def test_the_words_are_the_same_everywhere() -> None:
    assert get_args(PredictorName) == (*FIXED, *CALIBRATED, "auto")
    assert get_args(SignName) == SIGNS
    about = {"reference", "differs"}
    assert [f.name for f in fields(Method) if f.name not in about] == list(Options.__annotations__)
