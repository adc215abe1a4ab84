import pytest

from stator.core.hub_files import (
    SAFETENSORS_INDEX,
    DownloadProgress,
    Needs,
    format_bytes,
    small_files,
    weight_files,
)

LLAMA = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    SAFETENSORS_INDEX,
    "modeling_own.py",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model-00001-of-00001.bin",
    "tokenizer.json",
    "tokenizer.model",
    "training_args.bin",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_tokenizer_needs_no_weights_and_no_code() -> None:
    assert small_files(LLAMA, Needs.TOKENIZER) == [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        SAFETENSORS_INDEX,
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert weight_files(LLAMA, set(SHARDS), Needs.TOKENIZER) == []


def test_vllm_gets_the_code_of_the_checkpoint_too() -> None:
    assert "modeling_own.py" in small_files(LLAMA, Needs.VLLM)


@pytest.mark.parametrize(
    ("names", "indexed", "needs", "expected"),
    [
        (LLAMA, set(SHARDS), Needs.WEIGHTS, SHARDS),
        (LLAMA, set(SHARDS), Needs.VLLM, SHARDS),
        # An index is believed, also about a subdirectory or a file that is missing.
        (LLAMA, {"part/a.safetensors"}, Needs.VLLM, ["part/a.safetensors"]),
        (["model.safetensors", "pytorch_model.bin"], None, Needs.VLLM, ["model.safetensors"]),
        # Both layouts of Mistral: vLLM takes Mistral's own, others that of Hugging Face.
        (["consolidated.safetensors", *SHARDS], set(SHARDS), Needs.VLLM, ["consolidated.safetensors"]),
        (["consolidated.safetensors", *SHARDS], set(SHARDS), Needs.WEIGHTS, SHARDS),
        (["consolidated.safetensors", "model.safetensors"], None, Needs.WEIGHTS, ["model.safetensors"]),
        # Only vLLM reads the older formats, and never what belongs to training.
        (["pytorch_model.bin", "training_args.bin", "w.pt"], None, Needs.VLLM, ["pytorch_model.bin"]),
        (["optimizer.pt", "w.pt"], None, Needs.VLLM, ["w.pt"]),
        (["pytorch_model.bin"], None, Needs.WEIGHTS, []),
        (["original/consolidated.00.pth"], None, Needs.VLLM, []),
    ],
)
def test_one_format_of_the_weights(
    names: list[str], indexed: set[str] | None, needs: Needs, expected: list[str]
) -> None:
    assert weight_files(names, indexed, needs) == expected


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (12_345, "12.3 KB"),
        (999_600, "1.00 MB"),
        (1_234_000_000, "1.23 GB"),
        (410_000_000_000, "410 GB"),
    ],
)
def test_bytes_in_words(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_a_line_every_five_seconds_with_the_rate_of_the_last_ten() -> None:
    progress = DownloadProgress(410_000_000_000, 2, 100.0)
    assert progress.received(1_000_000_000, 102.0) is None
    assert progress.received(3_900_000_000, 105.0) == "downloaded 4.90 of 410 GB, 980 MB/s"
    assert progress.received(0, 107.0) is None
    # Nothing came for a quarter of a minute: the rate says so, and the first seconds no longer count.
    assert progress.received(0, 120.0) == "downloaded 4.90 of 410 GB, 0 B/s"
    assert progress.received(7_400_000_000, 125.0) == "downloaded 12.3 of 410 GB, 411 MB/s"


def test_a_line_at_the_end_of_each_file_and_one_of_all() -> None:
    progress = DownloadProgress(2_000_000, 2, 0.0)
    progress.received(1_500_000, 1.0)
    assert progress.finished("a", 1.5) == "a is complete (1 of 2 files); downloaded 1.50 of 2 MB, 1 MB/s"
    # An attempt that broke off is taken back.
    progress.received(-500_000, 2.0)
    progress.received(1_000_000, 3.0)
    assert progress.finished("b", 4.0) == "b is complete (2 of 2 files); downloaded 2 of 2 MB, 500 KB/s"
    assert progress.done(4.0) == "downloaded 2 MB in 4.0 s, 500 KB/s"
