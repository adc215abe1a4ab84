"""Load a bundled model in vLLM on the CPU and compare its greedy tokens in float32 with the goldens.

Run in an environment of its own (see README.md):

    VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 \
        python tools/bundled_model/check_vllm.py tiny-llama

A difference counts as harmless only where the golden's two best logits lie closer than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("tiny-llama", "tiny-decilm"))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    from vllm import LLM, SamplingParams, TokensPrompt, __version__

    golden = json.loads((ROOT / "tests" / "golden" / f"{args.name}.json").read_text(encoding="utf-8"))
    cases = golden["greedy"]
    begin = time.monotonic()
    llm = LLM(
        model=str(ROOT / "src" / "stator" / "models" / args.name),
        trust_remote_code=args.name == "tiny-decilm",
        dtype=args.dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=64,
        max_model_len=2048,
        max_num_seqs=8,
    )
    print(f"vLLM {__version__}: {args.name} loaded in {time.monotonic() - begin:.0f} s", flush=True)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=c["prompt_ids"]) for c in cases],
        [SamplingParams(temperature=0, max_tokens=c["max_tokens"]) for c in cases],
        use_tqdm=False,
    )
    bad = 0
    for case, output in zip(cases, outputs, strict=True):
        # vLLM keeps the end token in token_ids, as the goldens do
        got, want = list(output.outputs[0].token_ids), case["output_ids"]
        if got == want:
            continue
        at = next((i for i, (g, w) in enumerate(zip(got, want, strict=False)) if g != w), min(len(got), len(want)))
        near = case["near_ties"]
        harmless = at in near
        bad += not harmless
        print(
            f"{case['name']}: differs at {at} ({'near tie' if harmless else 'BAD'})",
            got[at : at + 4],
            want[at : at + 4],
        )
    same = sum(list(o.outputs[0].token_ids) == c["output_ids"] for c, o in zip(cases, outputs, strict=True))
    print(f"{args.name} {args.dtype}: {same} of {len(cases)} identical, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
