"""Published methods by name.

    >>> import timm, revify
    >>> model = revify.convert(timm.create_model("test_vit"), method=revify.presets.revvit)

All but `revnet` are z[k+1] = T(z[k]) + γ (z[k-1] − q(z[k])), the table of docs/method.md. Not among them are Momentum
ResNet (Sander et al. 2021), where γ < 0; MEFT (Liao et al. 2023), which adds adapters; and Gal et al. 2025, whose q is a
fixed-point step.
"""

from __future__ import annotations

from revify.couplings.shipped import additive
from revify.methods import Method

ON_GRID = "the stream is held on a grid, so that gradients are exact"

revnet = Method(
    streams="split",
    coupling=additive,
    reference="Gomez et al. 2017, The reversible residual network, arXiv 1707.04585, section 3.1",
    differs="on a grid; the inner layers of F and G stay as wide as the block's; strided blocks stay ordinary",
)
reformer = Method(
    predictor="identity",
    bits=0,
    unit="branch",
    sign="positive",
    reference="Kitaev, Kaiser and Levskaya 2020, Reformer: the efficient transformer, arXiv 2001.04451, section 3",
    differs="no hashed attention and no chunks; the output is the newest stream, not both side by side",
)
revvit = Method(
    predictor="identity",
    bits=0,
    unit="branch",
    sign="positive",
    reference="Mangalam et al. 2022, Reversible vision transformers, arXiv 2302.04869, eq. 8",
    differs="the output is the newest stream, so that the head fits; in the paper both streams, side by side",
)
re2tal = Method(
    predictor="identity",
    bits=0,
    sign="positive",
    reference="Zhao et al. 2023, Re2TAL: rewiring pretrained video backbones, arXiv 2211.14053",
    differs=ON_GRID,
)
midpoint = Method(
    predictor="midpoint",
    bits=0,
    sign="positive",
    reference="Chang et al. 2018, Reversible architectures for arbitrarily deep residual neural networks, arXiv 1709.03698",
    differs=ON_GRID,
)
bdia = Method(
    predictor="midpoint",
    bits=1,
    sign="random",
    reference="Zhang et al. 2024, On exact bit-level reversible transformers without changing architecture, arXiv 2407.09093",
    differs=ON_GRID,
)
dr2net = Method(
    predictor="zero",
    bits=3,
    sign="positive",
    reference="Zhao et al. 2024, Dr2Net: dynamic reversible dual-residual networks, arXiv 2401.04105",
    differs="γ stays at 1/8, near the paper's first β = 0.1, and T's own weight at 1; residue bits instead of drift",
)
idm = Method(
    predictor="output",
    bits=1,
    sign="positive",
    reference="Wang et al. 2025, Invertible diffusion models (TPAMI)",
    differs="γ stays at 1/2, where the paper learns it from there; residue bits instead of drift",
)
