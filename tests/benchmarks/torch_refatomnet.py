"""RefAtomNet in PyTorch for the benchmarks to time ours against: the trained half step by step as released, with its
optimizer as released and on all tensors together, and the frozen half of `transformers`."""

import math

import torch
from torch import nn

from ravar_jax.backbone import MEAN, STD, BackboneConfig
from tests.torch_blip2 import make_blip2

WIDTH, TOKENS, AGENTS, DETECTIONS, ACTIONS = 768, 32, 4, 100, 80
TOTAL_STEPS = 1000


class TorchAgentAttention(nn.Module):
    """Spec 3.6, step by step, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.pool = nn.Sequential(
            nn.Linear(WIDTH, WIDTH // 2), nn.GELU(), nn.Linear(WIDTH // 2, AGENTS * WIDTH)
        )
        self.scale = WIDTH**-0.5

    def forward(self, x, cross=None):
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, 1, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        pooled = self.pool(q.squeeze(1)).mean(dim=1)
        agents = pooled.reshape(rows, AGENTS, 1, WIDTH).transpose(1, 2)
        attention = ((agents * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        fused = attention
        if cross is not None:
            total = cross[0] + cross[1]
            fused = (fused * total.softmax(dim=-1) + fused * total.softmax(dim=1) + fused) / 3
        values = fused @ v
        if cross is not None:
            total = cross[2] + cross[3]
            agents = (agents * total.softmax(dim=-1) + agents * total.softmax(dim=1) + agents) / 3
        query_attention = ((q * self.scale) @ agents.transpose(-2, -1)).softmax(dim=-1)
        out = (query_attention @ values).transpose(1, 2).reshape(rows, tokens, WIDTH)
        return self.proj(out), attention, agents


class TorchMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.act = nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TorchAgentBlock(nn.Module):
    """Spec 3.7."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = TorchAgentAttention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = TorchMlp()

    def forward(self, x, cross=None):
        attended, attention, agents = self.attn(self.norm1(x), cross)
        x = x + attended
        return x + self.mlp(self.norm2(x)), attention, agents


class TorchFusion(nn.Module):
    """Spec 3.3 to 3.8 at the `official` settings, with the released tensor names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH + 4, WIDTH)
        self.proj_box = nn.Linear(DETECTIONS, TOKENS)
        self.proj_sem = nn.Linear(1, TOKENS)
        self.agent_temporal = TorchAgentBlock()
        self.agent_box = TorchAgentBlock()
        self.agent_semantic = TorchAgentBlock()
        self.bbox_regressio_head = nn.Sequential(
            nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 4)
        )
        self.classification_head = nn.Sequential(
            nn.Linear(WIDTH, 512),
            nn.Dropout(0.2),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, ACTIONS),
        )

    def forward(self, image_tokens, text_tokens, boxes, class_ids, label_table):
        cx, cy, w, h = boxes.unbind(-1)
        corners = torch.stack([cx - h / 2, cy - w / 2, cx + h / 2, cy + w / 2], dim=-1)
        labels = label_table.index_select(0, class_ids.flatten() - 1).view(*class_ids.shape, WIDTH)
        z = self.proj(torch.cat([corners, labels], dim=-1))
        z[class_ids != 1] = 0
        box_tokens = self.proj_box(z.transpose(1, 2)).transpose(1, 2)
        _, box_map, box_agents = self.agent_box(box_tokens)
        text = text_tokens.mean(dim=1).unsqueeze(-1)
        semantic = self.proj_sem(text).transpose(1, 2)
        semantic, semantic_map, semantic_agents = self.agent_semantic(semantic)
        cross = (semantic_map, box_map, semantic_agents, box_agents)
        temporal, _, _ = self.agent_temporal(image_tokens, cross)
        fused = z.mean(dim=1) + semantic.mean(dim=1) + temporal.mean(dim=1)
        return self.classification_head(fused), self.bbox_regressio_head(fused)


class TorchBertAdam:
    """The released optimizer: a loop over the tensors, spec section 6."""

    def __init__(self, model: nn.Module, learning_rate: float, warmup: float) -> None:
        self.tensors = list(model.named_parameters())
        self.learning_rate, self.warmup = learning_rate, warmup
        self.state: dict[str, dict] = {}

    def step(self) -> None:
        for name, p in self.tensors:
            if p.grad is None:
                continue
            if name not in self.state:
                zeros = torch.zeros_like(p.data)
                self.state[name] = {"step": 0, "m": zeros, "v": zeros.clone()}
            state = self.state[name]
            nn.utils.clip_grad_norm_(p, 1.0)
            grad = p.grad.data
            state["m"].mul_(0.9).add_(grad, alpha=0.1)
            state["v"].mul_(0.98).addcmul_(grad, grad, value=0.02)
            update = state["m"] / (state["v"].sqrt() + 1e-6)
            if "bias" not in name:
                update += 0.2 * p.data
            x = state["step"] / TOTAL_STEPS
            factor = x / self.warmup if x < self.warmup else 0.5 * (1 + math.cos(math.pi * x))
            p.data.add_(-self.learning_rate * factor * update)
            state["step"] += 1


def bert_adam(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    decaying: list[int],
    rate: torch.Tensor,
) -> None:
    """One update of the released optimizer on all tensors together (spec section 6), both its clips included."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    grads = torch._foreach_mul(grads, (1 / (norm + 1e-6)).clamp(max=1.0))
    norms = torch.stack(torch._foreach_norm(grads))
    grads = torch._foreach_mul(grads, list((1 / (norms + 1e-6)).clamp(max=1.0).unbind()))
    torch._foreach_lerp_(means, grads, 0.1)
    torch._foreach_mul_(squares, 0.98)
    torch._foreach_addcmul_(squares, grads, grads, 0.02)
    roots = torch._foreach_add(torch._foreach_sqrt(squares), 1e-6)
    updates = list(torch._foreach_div(means, roots))
    decays = torch._foreach_mul([params[i] for i in decaying], 0.2)
    for i, decay in zip(decaying, decays, strict=True):
        updates[i] = updates[i] + decay
    torch._foreach_sub_(params, torch._foreach_mul(updates, rate))


def torch_blip2(sizes: BackboneConfig, device: str) -> nn.Module:
    """Returns `transformers`' BLIP-2 as its users get it, with a key bias of zero, as EVA has none."""
    torch.manual_seed(0)
    with torch.device(device):
        model = make_blip2(
            sizes.vision,
            sizes.qformer,
            sizes.num_query_tokens,
            sizes.image_size,
            image_text_hidden_size=256,
        )
    with torch.no_grad():
        for parameter in (model.query_tokens, model.vision_model.embeddings.class_embedding):
            parameter.normal_(std=0.02)
        for layer in model.vision_model.encoder.layers:
            bias = layer.self_attn.qkv.bias.normal_(std=0.02)
            bias[len(bias) // 3 : 2 * len(bias) // 3] = 0
    return model.requires_grad_(False)


class TorchEncoder:
    """The frozen half: frames and ids to image and text tokens."""

    def __init__(self, blip2: nn.Module, device: str, dtype: torch.dtype, compiled: bool) -> None:
        self.blip2, self.dtype = blip2.to(dtype), dtype
        mean, std = (torch.tensor(x, device=device) for x in (MEAN, STD))
        self.scale, self.offset = 1 / (255 * std), mean / std
        if compiled:
            # Block by block, as PyTorch advises for models of like blocks.
            for layer in [*blip2.vision_model.encoder.layers, *blip2.qformer.encoder.layer]:
                layer.compile()
            self.pixels = torch.compile(self.pixels)

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        normal = frames.float() * self.scale - self.offset
        return normal.permute(0, 3, 1, 2).to(self.dtype).contiguous()

    def image(self, frames: torch.Tensor) -> torch.Tensor:
        """Maps uint8 frames (n, S, S, 3) to image tokens (n, N, D)."""
        with torch.no_grad():
            features = self.blip2.vision_model(self.pixels(frames)).last_hidden_state
            query_tokens = self.blip2.query_tokens.expand(len(frames), -1, -1)
            out = self.blip2.qformer(query_tokens, encoder_hidden_states=features)
            return out.last_hidden_state

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            embedded = self.blip2.embeddings(ids).to(self.dtype)
            return self.blip2.qformer(
                embedded, query_length=0, attention_mask=mask
            ).last_hidden_state
