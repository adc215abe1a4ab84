"""Write the tokenizer, the configs and the training tokens of the bundled models.

python tools/bundled_model/prepare.py tokenizer   # tokenizer and config files into src/stator/models/
python tools/bundled_model/prepare.py data --out DIR   # DIR/train*.npy and DIR/valid.npy, rows of 2,049
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import corpus
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

MODELS = Path(__file__).resolve().parents[2] / "src" / "stator" / "models"
CONTEXT = 2048
VOCAB = 4096
NO_LOSS = 1 << 14  # set on tokens which are context only, see train.py
SPECIAL = (corpus.BOS, corpus.EOS, corpus.IM_START, corpus.IM_END)

# Content is a string or a list of text parts; `developer` is the newer name of `system`.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'developer' %}{%- set role = 'system' %}"
    "{%- else %}{%- set role = message['role'] %}{%- endif %}"
    "{{- '<|im_start|>' + role + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- elif message['content'] %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- else %}{{- raise_exception('only text parts are supported') }}{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 3],
    "torch_dtype": "float16",
}

LLAMA = (
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    | BASE
    | {
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 640,
    }
)

# (heads per KV head, FFN multiplier) of each layer; None leaves the part out. The multipliers give widths of
# 768, 512, 512, 256 and 512 by the rule of the Nemotron-NAS models: 2/3 of multiplier times hidden size, rounded up
# to a multiple of 256.
DECILM_BLOCKS: tuple[tuple[int | None, float | None], ...] = (
    (2, 4.5),
    (None, 3.0),
    (4, None),
    (2, 2.625),
    (4, 1.3),
    (2, 3.0),
)


def block_config(group: int | None, mult: float | None) -> dict[str, object]:
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": group is None,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False, "sparsify": None},
    }


DECILM = (
    {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    }
    | BASE
    | {
        "num_hidden_layers": len(DECILM_BLOCKS),
        "num_key_value_heads": None,
        "intermediate_size": None,
        "block_configs": [block_config(*b) for b in DECILM_BLOCKS],
    }
)


def take(kinds: Iterator[tuple[str, str]], characters: int) -> Iterator[tuple[str, str]]:
    total = 0
    for kind, text in kinds:
        yield kind, text
        total += len(text)
        if total >= characters:
            return


def tokenizer_text(bible: corpus.Bible) -> Iterator[str]:
    """Text for the merges. Emoji, Cyrillic, Greek and East Asian characters are left out on purpose: with no merge of
    their own they take two to four tokens each, so that streamed output has characters that are split across tokens."""
    for kind, text in itertools.chain(
        (("bible", bible.plain(i)) for i in range(len(bible.chapters))), take(corpus.documents(11, bible), 6_000_000)
    ):
        if kind == "noise":
            continue
        if kind != "bible":
            for special in SPECIAL:
                text = text.replace(special, " ")
            text = "".join(c for c in text if ord(c) < 0x250)
        yield text


def make_tokenizer(bible: corpus.Bible) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(bible), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{corpus.BOS} $A",
                pair=f"{corpus.BOS} $A {corpus.BOS}:1 $B:1",
                special_tokens=[(corpus.BOS, 0)],
            ),
        ]
    )
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(tokenizer.get_vocab_size())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": corpus.BOS,
        "eos_token": corpus.IM_END,
        "pad_token": corpus.EOS,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "added_tokens_decoder": {
            str(i): {
                "content": t,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, t in enumerate(SPECIAL)
        },
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 1}
    for name, config in (("tiny-llama", LLAMA), ("tiny-decilm", DECILM)):
        folder = MODELS / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        for file, content in (
            ("tokenizer_config.json", settings),
            ("generation_config.json", generation),
            ("config.json", config),
        ):
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_rows(tokenizer: Tokenizer, texts: Iterator[tuple[str, str]], rows: int) -> np.ndarray:
    """Rows of CONTEXT + 1 tokens. Every row begins with a document; the last document of a row is cut off."""
    out = np.empty((rows, CONTEXT + 1), dtype=np.uint16)
    row: list[int] = []
    done = 0
    while True:
        batch = list(itertools.islice(texts, 2000))
        plain = [t if kind == "chat" else corpus.BOS + t + corpus.EOS for kind, t in batch]
        # the part before the mark takes part as context only: its tokens are marked for train.py
        heads = [t.split(corpus.NOISE)[0] if corpus.NOISE in t else "" for t in plain]
        tails = [t.split(corpus.NOISE)[-1] for t in plain]
        for head, tail in zip(
            tokenizer.encode_batch_fast(heads, add_special_tokens=False),
            tokenizer.encode_batch_fast(tails, add_special_tokens=False),
            strict=True,
        ):
            row += [i | NO_LOSS if i else i for i in head.ids] + tail.ids
            if len(row) > CONTEXT:
                out[done] = row[: CONTEXT + 1]
                row = []
                done += 1
                if done == rows:
                    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("tokenizer", "data"))
    parser.add_argument("--bible", type=Path, help="saved output of: bible -f ge1:1-rev22:21")
    parser.add_argument("--out", type=Path, default=Path("bundled-model-data"))
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument(
        "--seed", type=int, default=100, help="of the training rows; the validation rows have their own"
    )
    parser.add_argument("--name", default="train")
    args = parser.parse_args()
    bible = corpus.load_bible(args.bible)
    if args.step == "tokenizer":
        make_tokenizer(bible)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(MODELS / "tiny-llama" / "tokenizer.json"))
    for name, seed, rows in (("valid", 22, 128), (args.name, args.seed, args.rows)):
        data = make_rows(tokenizer, corpus.documents(seed, bible), rows)
        np.save(args.out / f"{name}.npy", data)
        print(name, data.shape)


if __name__ == "__main__":
    main()
