"""The optimiser as its papers write it, one parameter at a time: the truth for tests and for `bench.py curve`."""

import re

import torch

MUON = r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(fc|proj))\.weight|bigram\.proj\.weight"


def orthogonalised(matrix, steps, dtype):
    """Newton-Schulz of one matrix, in bf16 where the machine multiplies it."""
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)  # a branch that starts at zero has no gradient yet
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).float()


class Loop:
    """Each parameter updated alone, with Muon written out, its products in `dtype`, and torch's Adam, AdamW and
    clip_grad_norm_."""

    def __init__(self, model, s, dtype):
        self.s, self.dtype = s, dtype
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.muon = {name: torch.zeros_like(w) for name, w in self.weights.items() if re.fullmatch(MUON, name)}
        self.others, betas = [], dict(betas=(s.beta1, s.beta2), eps=s.adam_eps)
        for name, w in self.weights.items():
            if name == "lm_head.weight":
                self.others.append((s.head_lr, torch.optim.Adam([w], **betas)))
            elif name not in self.muon:
                table = s.tied_embed_lr if s.tie_embeddings else s.embed_lr
                lr = table if name in ("tok_emb.weight", "bigram.embed.weight") else s.scalar_lr
                self.others.append((lr, torch.optim.AdamW([w], weight_decay=s.weight_decay, **betas)))

    def step(self, gradients, step, multiplier):
        s = self.s
        for name, w in self.weights.items():
            w.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), s.grad_clip_norm) if s.grad_clip_norm else None
        warm_up = s.muon_momentum_warmup_steps
        share = min(step / warm_up, 1) if warm_up else 1
        mu = (1 - share) * s.muon_momentum_warmup_start + share * s.muon_momentum
        for name, m in self.muon.items():
            w, g, lr = self.weights[name].data, self.weights[name].grad, s.matrix_lr * multiplier
            m.copy_(mu * m + g)
            update = orthogonalised(g + mu * m, s.muon_backend_steps, self.dtype)
            update *= max(1, w.shape[0] / w.shape[1]) ** 0.5
            w.copy_((1 - lr * s.weight_decay) * w - lr * update)
        for lr, optimizer in self.others:
            optimizer.param_groups[0]["lr"] = lr * multiplier
            optimizer.step()
        return norm
