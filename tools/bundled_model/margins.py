"""How often are the two best logits of a greedy step closer than 1e-3? Over 50 prompts, with transformers in float32.

python tools/bundled_model/margins.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "golden"))

import corpus
from make_goldens import NAMES, Oracle, user

REQUESTS = (
    [f"Tell me a long story about {corpus.article(h.animal)}." for h in corpus.HEROES]
    + [f"Write a story about {h.name} and {corpus.TOPICS[i][0]}." for i, h in enumerate(corpus.HEROES[:12])]
    + [q for q, _ in corpus.BIBLE_FACTS[:6]]
    + ["Read me Psalm 1.", "Read me Genesis 1.", "Explain Docker networking.", "Hello!", "Count to twenty."]
    + ["Write a Python function that adds two numbers.", "What is the capital of France?", "Tell me a story."]
)


def repeats(ids: list[int], width: int = 24) -> bool:
    """Does any run of ``width`` tokens come again at once, as in a loop?"""
    return any(
        ids[i : i + p] == ids[i + p : i + 2 * p] for p in range(1, width) for i in range(len(ids) - 2 * p) if p > 3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--max-tokens", type=int, default=1200)
    args = parser.parse_args()
    for name in args.names:
        oracle = Oracle(name)
        near = steps = loops = 0
        smallest = float("inf")
        lengths = []
        for request in REQUESTS:
            text = oracle.render(user(request))
            ids = oracle.tokenizer(text, add_special_tokens=False)["input_ids"]
            out, gaps = oracle.greedy(ids, args.max_tokens)
            near += sum(g < 1e-3 for g in gaps)
            steps += len(gaps)
            smallest = min(smallest, *gaps)
            loops += repeats(out)
            lengths.append(len(out))
        print(
            f"{name}: {len(REQUESTS)} prompts, {steps} steps, {near} with a gap below 1e-3 ({near / steps:.5%}), "
            f"smallest gap {smallest:.5f}, longest {max(lengths)}, texts with an immediate repeat {loops}",
            flush=True,
        )


if __name__ == "__main__":
    main()
