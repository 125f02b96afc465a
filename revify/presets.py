"""Published methods by name, as options of `convert`.

    >>> import timm, revify
    >>> model = revify.convert(timm.create_model("test_vit"), **revify.presets.revvit.options)

All but `revnet` are z[k+1] = T(z[k]) + γ (z[k-1] − q(z[k])), the table of docs/method.md. Not among them are Momentum
ResNet (Sander et al. 2021), where γ < 0; MEFT (Liao et al. 2023), which adds adapters; and Gal et al. 2025, whose q is a
fixed-point step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from revify.conversion import PredictorName, SignName, Streams, Unit
from revify.couplings.formulas import Formula
from revify.couplings.shipped import additive


class Options(TypedDict):
    """What a preset gives to `plan` and `convert`."""

    predictor: PredictorName
    bits: int
    unit: Unit
    sign: SignName


class SplitOptions(TypedDict):
    """What a preset with split streams gives to `plan` and `convert`."""

    streams: Streams
    coupling: Formula


@dataclass(frozen=True, slots=True)
class Preset:
    """A published method.

    Args:
        reference: who, when, where.
        predictor: q.
        bits: b; the gain is γ = 2^-b.
        unit: what one step is.
        sign: of γ.
        differs: what the paper does that this does not, or the other way round.
    """

    reference: str
    predictor: PredictorName
    bits: int
    unit: Unit = "block"
    sign: SignName = "positive"
    differs: str = "the stream is held on a grid, so that gradients are exact"

    @property
    def options(self) -> Options:
        """The options of `convert`."""
        return {
            "predictor": self.predictor,
            "bits": self.bits,
            "unit": self.unit,
            "sign": self.sign,
        }


@dataclass(frozen=True, slots=True)
class SplitPreset:
    """A published method whose streams are the halves of the channels.

    Args:
        reference: who, when, where.
        coupling: its formula.
        differs: as for `Preset`.
    """

    reference: str
    coupling: Formula
    differs: str

    @property
    def options(self) -> SplitOptions:
        """The options of `convert`."""
        return {"streams": "split", "coupling": self.coupling}


revnet = SplitPreset(
    "Gomez et al. 2017, The reversible residual network, arXiv 1707.04585, section 3.1",
    coupling=additive,
    differs="on a grid; the inner layers of F and G stay as wide as the block's; strided blocks stay ordinary",
)
reformer = Preset(
    "Kitaev, Kaiser and Levskaya 2020, Reformer: the efficient transformer, arXiv 2001.04451, section 3",
    predictor="identity",
    bits=0,
    unit="branch",
    differs="no hashed attention and no chunks; the output is the newest stream, not both side by side",
)
revvit = Preset(
    "Mangalam et al. 2022, Reversible vision transformers, arXiv 2302.04869, eq. 8",
    predictor="identity",
    bits=0,
    unit="branch",
    differs="the output is the newest stream, so that the head fits; in the paper both streams, side by side",
)
re2tal = Preset(
    "Zhao et al. 2023, Re2TAL: rewiring pretrained video backbones, arXiv 2211.14053",
    predictor="identity",
    bits=0,
)
midpoint = Preset(
    "Chang et al. 2018, Reversible architectures for arbitrarily deep residual neural networks, arXiv 1709.03698",
    predictor="midpoint",
    bits=0,
)
bdia = Preset(
    "Zhang et al. 2024, On exact bit-level reversible transformers without changing architecture, arXiv 2407.09093",
    predictor="midpoint",
    bits=1,
    sign="random",
)
dr2net = Preset(
    "Zhao et al. 2024, Dr2Net: dynamic reversible dual-residual networks, arXiv 2401.04105",
    predictor="zero",
    bits=3,
    differs="γ stays at 1/8, near the paper's first β = 0.1, and T's own weight at 1; residue bits instead of drift",
)
idm = Preset(
    "Wang et al. 2025, Invertible diffusion models (TPAMI)",
    predictor="output",
    bits=1,
    differs="γ stays at 1/2, where the paper learns it from there; residue bits instead of drift",
)
