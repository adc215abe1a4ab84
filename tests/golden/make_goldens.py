"""Golden data of the bundled models, computed with transformers on torch in float32.

    python tests/golden/make_goldens.py           # write the files beside this script
    python tests/golden/make_goldens.py --check   # recompute and compare; exit code 1 on a difference

Files:

* ``text.json``: encodings of plain texts, and conversations with their rendered text and token ids;
* ``<model>.json``: greedy continuations (``near_ties`` are the output positions where the two best logits lie closer
  than 1e-3, so that another implementation may rightly differ from there on);
* ``<model>-logits.npz``: for each prompt ``<prompt>.ids``, ``<prompt>.positions`` and the float32 ``<prompt>.logits``
  there;
* ``long_prompt.json``: two stories of tools/bundled_model/corpus.py, from which the long prompts are cut.

transformers knows no Nemotron-NAS models, so the oracle of ``tiny-decilm`` is put together from its Llama parts.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "src" / "stator" / "models"
NAMES = ("tiny-llama", "tiny-decilm")
TOLERANCE = 1e-3

Message = dict[str, Any]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


CONVERSATIONS: dict[str, list[Message]] = {
    "hello": user("Hello!"),
    "ark": user("Who built the ark?"),
    "fox": user("Tell me a long story about a fox."),
    "system": [{"role": "system", "content": "You are a storyteller."}, *user("Tell me a story about a bear.")],
    "developer": [{"role": "developer", "content": "Answer briefly."}, *user("What is 3 plus 4?")],
    "turns": [
        *user("Where does Łukasz the bear live?"),
        {"role": "assistant", "content": "Łukasz the bear lives in the cave of stones. 🐻"},
        *user("What does Łukasz like to eat?"),
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Tell me a story "}, {"type": "text", "text": "about 猫."}],
        }
    ],
    "multibyte": user("Who are 雪 and Дима? 🦊🌙\n\n안녕하세요, ¿qué tal?"),
    "empty": user(""),
    "spaces": user("  two  spaces\tand\n\n\nlines  "),
    "psalm": [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        *user("Read me Psalm 23."),
    ],
    "answered": [*user("Good night!"), {"role": "assistant", "content": "Good night! 🌙"}],
}

TEXTS = (
    "",
    "x",
    "In the beginning God created",
    "Zoë, José, Łukasz, Ōtani, 猫, Москва 🦊🌙",
    "  leading and trailing  ",
    "line one\nline two\r\n\n\ttabbed",
    "Don't stop: it's 1234567890, isn't it?",
    "👩‍👩‍👧 e\u0301 \u200b \u00a0 ﬁ",
    "<|im_start|>user\nHello!<|im_end|>",
    "def f(x):\n    return x ** 2  # α",
)

# name: (prompt, most tokens); a conversation is named, a list of ids is cut from the long story
GREEDY: dict[str, tuple[str, str, int]] = {
    "chat-hello": ("chat", "hello", 64),
    "chat-ark": ("chat", "ark", 64),
    "chat-long-fox": ("chat", "fox", 640),
    "chat-system-bear": ("chat", "system", 200),
    "chat-developer-sum": ("chat", "developer", 64),
    "chat-turns": ("chat", "turns", 64),
    "chat-parts-cat": ("chat", "parts", 200),
    "chat-multibyte": ("chat", "multibyte", 64),
    "chat-empty": ("chat", "empty", 64),
    "chat-psalm": ("chat", "psalm", 200),
    "text-genesis": ("text", "In the beginning God created", 128),
    "text-once": ("text", "Once upon a time", 128),
    "text-shepherd": ("text", "The LORD is my shepherd;", 128),
    "text-tale": ("text", "猫 the cat and the moon 🐱🌙\n\n", 128),
    "text-play": ("text", "Zoë the fox 🦊 met José the owl 🦉 at", 200),
    "text-unknown": ("text", "Serving large models over many machines", 64),
    "ids-63": ("ids", "63", 64),
    "ids-64": ("ids", "64", 64),
    "ids-65": ("ids", "65", 64),
    "ids-128": ("ids", "128", 64),
    "ids-1000": ("ids", "1000", 64),
    "ids-1984": ("ids", "1984", 64),
}

# name: (prompt, positions); a negative position counts from the end
LOGITS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "bos": ("text", "", (-1,)),
    "short": ("text", "In the beginning God created", (0, -1)),
    "chat": ("chat", "hello", (-2, -1)),
    "multibyte": ("text", "Zoë, José, Łukasz, Ōtani, 猫, Москва 🦊🌙", (-4, -2, -1)),
    "ids-63": ("ids", "63", (-1,)),
    "ids-64": ("ids", "64", (-1,)),
    "ids-65": ("ids", "65", (62, 63, 64)),
    "ids-129": ("ids", "129", (127, 128)),
    "ids-1000": ("ids", "1000", (500, 511, 512, -1)),
    "ids-2048": ("ids", "2048", (1023, 2046, 2047)),
}


class DeciLM(nn.Module):
    """A Nemotron-NAS model from transformers' Llama parts: a layer has its own number of KV heads and FFN width, or
    lacks attention or FFN altogether."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        base = LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config["head_dim"],
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        )
        base._attn_implementation = "sdpa"
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.norm = LlamaRMSNorm(hidden, config["rms_norm_eps"])
        self.rotary = LlamaRotaryEmbedding(base)
        self.layers = nn.ModuleList()
        cached = 0
        for block in config["block_configs"]:
            attention, ffn = block["attention"], block["ffn"]
            own = copy.deepcopy(base)
            layer = nn.Module()
            if not attention["no_op"]:
                own.num_key_value_heads = heads // attention["n_heads_in_group"]
                layer.input_layernorm = LlamaRMSNorm(hidden, own.rms_norm_eps)
                # the cache has an entry for each layer with attention only
                layer.self_attn = LlamaAttention(own, layer_idx=cached)
                cached += 1
            if not ffn["no_op"]:
                width = int(2 * ffn["ffn_mult"] * hidden / 3)
                own.intermediate_size = (width + 255) // 256 * 256
                layer.post_attention_layernorm = LlamaRMSNorm(hidden, own.rms_norm_eps)
                layer.mlp = LlamaMLP(own)
            self.layers.append(layer)
        weights = {k.removeprefix("model."): v.float() for k, v in load_file(folder / "model.safetensors").items()}
        self.load_state_dict(weights, strict=True)

    def forward(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        past = cache.get_seq_length()
        positions = torch.arange(past, past + tokens.shape[1])[None]
        x = self.embed_tokens(tokens)
        rotary = self.rotary(x, positions)
        for layer in self.layers:
            if hasattr(layer, "self_attn"):
                y = layer.input_layernorm(x)
                x = x + layer.self_attn(y, position_embeddings=rotary, attention_mask=None, past_key_values=cache)[0]
            if hasattr(layer, "mlp"):
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x) @ self.embed_tokens.weight.T


class Oracle:
    """One model with its tokenizer."""

    def __init__(self, name: str) -> None:
        folder = MODELS / name
        # both models have the same tokenizer; asking for it by the Llama folder avoids the other's configuration class
        same = [(MODELS / n / f).read_bytes() for f in ("tokenizer.json", "tokenizer_config.json") for n in NAMES]
        assert same[0] == same[1] and same[2] == same[3]
        self.tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llama")
        self.ends = set(json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"])
        if name == "tiny-decilm":
            self._decilm: DeciLM | None = DeciLM(folder).eval()
        else:
            self._decilm = None
            self._llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, ids: list[int], cache: DynamicCache) -> torch.Tensor:
        tokens = torch.tensor([ids])
        if self._decilm is not None:
            return self._decilm(tokens, cache)[0]
        return self._llama(tokens, past_key_values=cache, use_cache=True).logits[0]

    def greedy(self, ids: list[int], most: int) -> tuple[list[int], list[float]]:
        """The continuation with its end token, and the gap between the two best logits of each step."""
        cache = DynamicCache()
        out: list[int] = []
        gaps: list[float] = []
        feed = ids
        while len(out) < most:
            best = torch.topk(self.logits(feed, cache)[-1], 2)
            token = int(best.indices[0])
            out.append(token)
            gaps.append(float(best.values[0] - best.values[1]))
            if token in self.ends:
                break
            feed = [token]
        return out, gaps

    def render(self, messages: list[Message]) -> str:
        last = messages[-1]["role"] != "assistant"
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=last)

    def long_ids(self) -> list[int]:
        """A prompt as long as the context: one story after another."""
        text = "\n\n".join(json.loads((HERE / "long_prompt.json").read_text(encoding="utf-8")))
        return self.tokenizer(text, verbose=False)["input_ids"]

    def prompt(self, kind: str, what: str) -> list[int]:
        if kind == "chat":
            return self.tokenizer(self.render(CONVERSATIONS[what]), add_special_tokens=False)["input_ids"]
        if kind == "ids":
            ids = self.long_ids()
            assert len(ids) >= int(what), len(ids)
            return ids[: int(what)]
        return self.tokenizer(what)["input_ids"]


def make_text(oracle: Oracle) -> dict[str, Any]:
    conversations = []
    for name, messages in CONVERSATIONS.items():
        prompt = messages[-1]["role"] != "assistant"
        ids = oracle.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
        text = oracle.render(messages)
        assert ids == oracle.tokenizer(text, add_special_tokens=False)["input_ids"], name
        conversations.append(
            {"name": name, "messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids}
        )
    encodings = [
        {
            "text": text,
            "ids": oracle.tokenizer(text)["input_ids"],
            "ids_without_bos": oracle.tokenizer(text, add_special_tokens=False)["input_ids"],
        }
        for text in TEXTS
    ]
    return {"conversations": conversations, "encodings": encodings}


def make_greedy(oracle: Oracle) -> dict[str, Any]:
    cases = []
    for name, (kind, what, most) in GREEDY.items():
        ids = oracle.prompt(kind, what)
        out, gaps = oracle.greedy(ids, most)
        cases.append(
            {
                "name": name,
                "prompt": oracle.tokenizer.decode(ids),
                "text": oracle.tokenizer.decode(out, skip_special_tokens=True),
                "finish_reason": "stop" if out[-1] in oracle.ends else "length",
                "max_tokens": most,
                "smallest_gap": round(min(gaps), 5),
                "near_ties": [i for i, gap in enumerate(gaps) if gap < TOLERANCE],
                "prompt_ids": ids,
                "output_ids": out,
            }
        )
    return {"dtype": "float32", "greedy": cases}


def make_logits(oracle: Oracle) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, (kind, what, positions) in LOGITS.items():
        ids = oracle.prompt(kind, what)
        logits = oracle.logits(ids, DynamicCache())
        where = [p % len(ids) for p in positions]
        out[f"{name}.ids"] = np.array(ids, dtype=np.int32)
        out[f"{name}.positions"] = np.array(where, dtype=np.int32)
        out[f"{name}.logits"] = logits[where].float().numpy()
    return out


def compact(value: Any) -> str:
    """JSON with one line for each list of numbers."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    lines: list[str] = []
    for line in text.splitlines():
        bare = line.strip().rstrip(",")
        if lines and (bare.lstrip("-").isdigit() or (bare == "]" and lines[-1][-1] in "[,0123456789")):
            lines[-1] += line.strip()
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def compare(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences of greedy texts that no near tie explains."""
    bad = []
    before = {c["name"]: c for c in old["greedy"]}
    after = {c["name"]: c for c in new["greedy"]}
    if before.keys() != after.keys():
        return [f"{name}: other cases than stored"]
    for case, was in before.items():
        now = after[case]
        if was["prompt_ids"] != now["prompt_ids"]:
            bad.append(f"{name} {case}: other prompt ids")
        a, b = was["output_ids"], now["output_ids"]
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if at not in was["near_ties"]:
            bad.append(f"{name} {case}: greedy ids differ at {at}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    bad: list[str] = []
    for name in NAMES:
        oracle = Oracle(name)
        text, greedy, logits = make_text(oracle), make_greedy(oracle), make_logits(oracle)
        if not args.check:
            (HERE / "text.json").write_text(compact(text), encoding="utf-8")
            (HERE / f"{name}.json").write_text(compact(greedy), encoding="utf-8")
            np.savez_compressed(HERE / f"{name}-logits.npz", **logits)
            continue
        if json.loads((HERE / "text.json").read_text(encoding="utf-8")) != text:
            bad.append(f"{name}: text.json differs")
        bad += compare(name, json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")), greedy)
        with np.load(HERE / f"{name}-logits.npz") as stored:
            if set(stored.files) != set(logits):
                bad.append(f"{name}: other logits than stored")
            for key in sorted(set(stored.files) & set(logits)):
                if stored[key].shape != logits[key].shape:
                    bad.append(f"{name} {key}: other shape")
                elif np.abs(stored[key] - logits[key]).max() > TOLERANCE:
                    bad.append(f"{name} {key}: differs by {np.abs(stored[key] - logits[key]).max():.2g}")
    for line in bad:
        print(line)
    print("goldens", "differ" if bad else "agree" if args.check else "written")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
