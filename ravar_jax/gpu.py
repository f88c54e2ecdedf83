"""What NVIDIA GPUs need said: that they are there, and how XLA compiles for them."""

import jax
from jax.extend import backend


def has_cuda() -> bool:
    """Whether JAX runs on NVIDIA GPUs."""
    return jax.default_backend() == "gpu" and "cuda" in backend.get_backend().platform_version


def compiler_options() -> dict[str, bool] | None:
    """Returns `compiler_options` of `jax.jit` for the steps that take the time; None but on NVIDIA GPUs.

    cuBLAS adds biases within its products and compiles at once; XLA's own products, which it tries first, do neither
    and are no faster in ViT-g (README, "Speed").
    """
    return {"xla_gpu_enable_triton_gemm": False} if has_cuda() else None
