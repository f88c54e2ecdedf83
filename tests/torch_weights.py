"""Random weights of small PyTorch models, for parity tests."""

from typing import Any

import numpy as np
import torch


def randomize(module: torch.nn.Module) -> None:
    """Gives every parameter a random value, norms and biases too, so that none can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)


def state_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the tensors of a module by name."""
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def assert_gradients_equal(ours: dict[str, np.ndarray], module: torch.nn.Module) -> None:
    """Compares gradients by PyTorch name: to 1e-3 of each tensor's norm, and zero where PyTorch has none.

    The floor is for gradients that are zero but for rounding (of biases on attention keys).
    """
    theirs: dict[str, Any] = {name: p.grad for name, p in module.named_parameters()}
    assert set(ours) <= set(theirs)
    assert any(theirs[name] is not None for name in ours)
    for name, gradient in ours.items():
        expected = np.zeros(1) if theirs[name] is None else theirs[name].numpy()
        error = np.linalg.norm(gradient - expected)
        assert error <= 1e-3 * np.linalg.norm(expected) + 1e-5, (name, error)
