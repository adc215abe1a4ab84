"""Train one bundled model from the rows of prepare.py and store it in F16.

    python tools/bundled_model/train.py tiny-llama --data DIR --out model.safetensors --steps 5000

Runs on a GPU when there is one and on the CPU otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import TinyLM
from safetensors.torch import save_file

NO_LOSS = 1 << 14  # as in prepare.py, which marks text that is context only
MODELS = Path(__file__).resolve().parents[2] / "src" / "stator" / "models"


def schedule(progress: float, warmup: float) -> float:
    """Warm-up, a plateau, then a linear fall to nearly nothing over the second half."""
    if progress < warmup:
        return progress / warmup
    return min(1.0, max(0.01, 2.0 * (1.0 - progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("tiny-llama", "tiny-decilm"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64, help="rows of 2,048 tokens in a step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=0, help="finish the schedule within this time")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    config = json.loads((MODELS / args.name / "config.json").read_text(encoding="utf-8"))
    model = TinyLM(config)
    model.initialise(args.seed)
    model.to(device)
    print(args.name, "parameters:", sum(p.numel() for p in model.parameters()), flush=True)

    parts = [np.load(p).astype(np.int16) for p in sorted(args.data.glob("train*.npy"))]
    train = torch.from_numpy(np.concatenate(parts)).to(device)
    print("training tokens:", train.numel(), flush=True)
    valid = torch.from_numpy(np.load(args.data / "valid.npy").astype(np.int16)).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.long()
        tokens = rows & (NO_LOSS - 1)
        target = torch.where(rows >= NO_LOSS, -100, tokens)[:, 1:]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())

    step_loss = torch.compile(loss_of) if args.compile else loss_of

    @torch.no_grad()
    def validate() -> float:
        losses = [loss_of(valid[i : i + 16]).item() for i in range(0, len(valid), 16)]
        return sum(losses) / len(losses)

    order = torch.Generator().manual_seed(args.seed)
    queue = torch.empty(0, dtype=torch.long)
    begin = time.monotonic()
    for step in range(args.steps):
        elapsed = time.monotonic() - begin
        progress = max(step / args.steps, elapsed / args.max_seconds if args.max_seconds else 0.0)
        if progress >= 1:
            break
        if len(queue) < args.batch:
            queue = torch.cat((queue, torch.randperm(len(train), generator=order)))
        index, queue = queue[: args.batch], queue[args.batch :]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(progress, 0.03)
        loss = step_loss(train[index.to(device)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0 or step == 20:
            print(f"step {step} {elapsed:.0f} s loss {loss.item():.4f} valid {validate():.4f}", flush=True)
    print(f"steps {step + 1} {time.monotonic() - begin:.0f} s valid {validate():.4f}", flush=True)

    state = {n: p.detach().half().cpu().contiguous() for n, p in model.named_parameters()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite in F16")
    # alphabetical order and no time stamp: equal weights give an equal file
    save_file(dict(sorted(state.items())), args.out, metadata={"format": "pt"})
    model.load_state_dict({n: t.float() for n, t in state.items()}, strict=True)
    print(f"size {args.out.stat().st_size} valid in F16 {validate():.4f}", flush=True)


if __name__ == "__main__":
    main()
