"""ResNet v1.5 with frozen batch norm: the convolutional backbone of DETR (spec 3.2).

pixels --7x7 / 2, norm, ReLU, 3x3 max-pool / 2--> stages of bottleneck blocks, all but the first / 2 --> feature map

Paddings are PyTorch's, symmetric; "SAME" would pad a stride-2 convolution of an even side on one side only.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.sharding import constrain

EPSILON = 1e-5
BOTTLENECK = 4  # a block's output is as many times wider than its 3x3 convolution


class FrozenBatchNorm(nn.Module):
    """Batch norm by stored statistics: four vectors, as a checkpoint holds them, folded to a scale and a shift."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to the same shape; the arithmetic is float32."""
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (1, 1, 1, x.shape[-1])
        weight, bias = self.param("scale", ones, shape[-1:]), self.param("bias", zeros, shape[-1:])
        mean, var = self.param("mean", zeros, shape[-1:]), self.param("var", ones, shape[-1:])
        scale = weight * jax.lax.rsqrt(var + EPSILON)
        shift = bias - mean * scale
        y = x.astype(jnp.float32) * scale.reshape(shape) + shift.reshape(shape)
        return y.astype(self.dtype)


class Bottleneck(nn.Module):
    """ReLU(shortcut(x) + conv3(ReLU(conv2(ReLU(conv1(x)))))), each convolution followed by its norm.

    Attributes:
        width: channels of the output.
        stride: of the 3x3 convolution (v1.5; the original paper has it in the first 1x1) and of the shortcut.
        project: whether the shortcut is a convolution; otherwise it is x.
        dtype: of the computation.
    """

    width: int
    stride: int
    project: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), width)."""
        inner = self.width // BOTTLENECK
        h = nn.relu(_conv_norm(x, inner, 1, 1, self.dtype, "conv1", "norm1"))
        h = nn.relu(_conv_norm(h, inner, 3, self.stride, self.dtype, "conv2", "norm2"))
        h = _conv_norm(h, self.width, 1, 1, self.dtype, "conv3", "norm3")
        if self.project:
            names = "shortcut_conv", "shortcut_norm"
            x = _conv_norm(x, self.width, 1, self.stride, self.dtype, *names)
        return constrain(nn.relu(x + h))


class ResNet(nn.Module):
    """The backbone; ResNet-50 is stem width 64, widths (256, 512, 1024, 2048), depths (3, 4, 6, 3).

    Attributes:
        stem_width: channels of the 7x7 convolution.
        widths: output channels of each stage, multiples of 4.
        depths: blocks of each stage; the first one projects its shortcut.
        dtype: of the convolutions; norms are float32.
    """

    stem_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps pixels (B, H, W, 3) to the last feature map (B, ceil(H / 32), ceil(W / 32), C) for four stages."""
        x = pixels.astype(self.dtype)
        x = nn.relu(_conv_norm(x, self.stem_width, 7, 2, self.dtype, "stem_conv", "stem_norm"))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True), 1):
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                name = f"stage{stage}_block{i}"
                x = Bottleneck(width, stride, i == 0, self.dtype, name=name)(x)
        return x


def _conv_norm(
    x: jax.Array, width: int, side: int, stride: int, dtype: jnp.dtype, conv: str, norm: str
) -> jax.Array:
    x = nn.Conv(
        width,
        (side, side),
        strides=stride,
        padding=side // 2,
        use_bias=False,
        dtype=dtype,
        name=conv,
    )(x)
    return FrozenBatchNorm(dtype, name=norm)(x)
