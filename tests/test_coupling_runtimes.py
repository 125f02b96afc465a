"""What a runtime does with a coupling: it goes through the instructions, and calls each branch once."""

from __future__ import annotations

from collections import Counter
from functools import partial

import formulas
import pytest
import torch
from torch import nn, tanh

from revify.algebra.formulas import Formula
from revify.algebra.programs import Call, names
from revify.couplings import additive, damped, derive, half, single, swapped


class Net(nn.Module):
    """A small network of one or two streams, with one or two results, that counts its calls."""

    def __init__(self, results, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(results, 5, 5, dtype=torch.float64, generator=generator) / 3
        self.weights = nn.ParameterList(weights.unbind())
        self.calls = 0

    def forward(self, *streams):
        self.calls += 1
        mixed = sum(place * tanh(stream) for place, stream in enumerate(streams, 1))
        given = tuple(mixed @ weight for weight in self.weights)
        return given if len(given) > 1 else given[0]


def reconstruct(coupling, outputs, branches):
    """Every value of the formula, without a gradient; and each branch call, with the graph that it left."""
    values, calls = dict(zip(coupling.inverse.inputs, outputs, strict=True)), {}
    for step in coupling.inverse.instructions:
        if isinstance(step, Call):
            leaves = {name: values[name].detach().requires_grad_() for name in names(step.operands)}
            with torch.enable_grad():
                calls[step] = leaves, step.execute(leaves, branches)
            values |= zip(step.results, (given.detach() for given in calls[step][1]), strict=True)
        else:
            (values[step.result],) = step.execute(values, {})
    return values, calls


def backward(coupling, outputs, gradients, branches):
    """The gradients of the streams; those of the branches' parameters are accumulated."""
    values, calls = reconstruct(coupling, outputs, branches)
    due = Counter(dict(zip(coupling.forward.outputs, gradients, strict=True)))
    for step in reversed(coupling.forward.instructions):
        if isinstance(step, Call):
            leaves, given = calls[step]
        else:
            leaves = {name: values[name].detach().requires_grad_() for name in names(step.operands)}
            given = step.execute(leaves, {})
        torch.autograd.backward(given, [due.pop(name) for name in step.results])
        for name, leaf in leaves.items():
            due[name] = due[name] + leaf.grad
    return [due[name] for name in coupling.forward.inputs]


@pytest.mark.parametrize("formula", formulas.DERIVED, ids=lambda formula: formula.__name__)
def test_a_runtime_gets_the_gradients_with_one_call_of_each_branch(formula: Formula) -> None:
    coupling = derive(formula)
    branches = {name: Net(count, seed) for seed, (name, count) in enumerate(coupling.forward.gives.items())}
    parameters = [weight for net in branches.values() for weight in net.parameters()]
    generator = torch.Generator().manual_seed(9)
    count = len(coupling.forward.inputs)
    streams = torch.randn(count, 4, 5, dtype=torch.float64, generator=generator).requires_grad_().unbind()
    gradients = torch.randn(count, 4, 5, dtype=torch.float64, generator=generator).unbind()
    outputs = formula(*streams, *branches.values())
    expected = torch.autograd.grad(outputs, [*streams, *parameters], gradients)
    calls = {name: net.calls for name, net in branches.items()}

    found = backward(coupling, [y.detach() for y in outputs], gradients, branches)

    assert {name: net.calls - calls[name] for name, net in branches.items()} == calls
    for got, want in zip([*found, *(weight.grad for weight in parameters)], expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def run_on_grid(program, streams, branches, bits, residues):
    """Run in multiples of 2^-12; a product that contracts leaves a residue, which the inverse takes up."""
    values = dict(zip(program.inputs, streams, strict=True))
    for step in program.instructions:
        results = step.execute(values, branches)
        if isinstance(step, Call):
            results = tuple((result * 4096).round() / 4096 for result in results)
        elif step.undoes in bits:
            results = (results[0] + residues[step.undoes],)
        elif step.result in bits and step.undoes is None:
            factor = 2.0 ** -bits[step.result]
            whole = (results[0] * 4096).floor() / 4096
            residues[step.result] = (results[0] - whole) / factor
            results = (whole,)
        values |= zip(step.results, results, strict=True)
    return [values[name] for name in program.outputs]


@pytest.mark.parametrize("formula", [additive, swapped, single, half, damped, partial(damped, gamma=0.125)])
def test_exact_couplings_come_back_bit_for_bit_on_the_grid(formula: Formula) -> None:
    coupling = derive(formula)
    bits = coupling.determinant.residue_bits
    names = coupling.forward.branches
    layers = [{name: Net(1, 7 * layer + place) for place, name in enumerate(names)} for layer in range(20)]
    generator = torch.Generator().manual_seed(1)
    start = list((torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 4096).round() / 4096)
    streams, kept = start, []
    for branches in layers:
        kept.append({})
        streams = run_on_grid(coupling.forward, streams, branches, bits, kept[-1])
    lossy = streams
    for branches, residues in zip(reversed(layers), reversed(kept), strict=True):
        streams = run_on_grid(coupling.inverse, streams, branches, bits, residues)
        lossy = run_on_grid(coupling.inverse, lossy, branches, bits, Counter())
    assert coupling.determinant.exact
    assert all(map(torch.equal, streams, start))
    assert all(map(torch.equal, lossy, start)) == (not bits)
