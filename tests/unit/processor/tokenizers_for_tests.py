"""Small tokenizers of every kind in use, trained here on a few lines of text."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "In the beginning God created the heaven and the earth.",
    "Der Fuchs läuft über die grüne Brücke, naïve façade, coöperate.",
    "東京は日本の首都です。 北京是中国的首都。",
    "🙂 🙃 👩‍👩‍👧 emoji and text 🙂",
    "the the the and and and of of of of the earth the heaven the waters",
] * 4

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken(" two words ", special=False), AddedToken("é", special=False)])
    return tokenizer


@cache
def sentencepiece(strip: bool) -> Tokenizer:
    """Llama 2's composition (strip) and Gemma's (not)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=["<unk>", *SPECIAL, *byte_tokens],
        show_progress=False,
        limit_alphabet=60,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _without_special_bytes(tokenizer)


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens were put in as special tokens to get into the vocabulary; real models have them as plain entries."""
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [entry for entry in config["added_tokens"] if not entry["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(config))


@cache
def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@cache
def no_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer
