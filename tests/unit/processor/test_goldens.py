"""Renderings, ids and texts of the bundled model as transformers made them (tests/golden/make_goldens.py)."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

import stator
from stator.messages.openai import ChatMessage
from stator.messages.tokens import unpack
from stator.processor.chat_template import ChatTemplate
from stator.processor.tokenizer import ModelTokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
BUNDLED = Path(stator.__file__).parent / "models" / "tiny-llama"
TEXT: dict[str, Any] = msgspec.json.decode((GOLDEN / "text.json").read_bytes())
GREEDY: list[dict[str, Any]] = msgspec.json.decode((GOLDEN / "tiny-llama.json").read_bytes())["greedy"]
CONVERSATIONS = [each for each in TEXT["conversations"] if each["add_generation_prompt"]]


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer.load(BUNDLED)


@pytest.mark.parametrize("golden", CONVERSATIONS, ids=[each["name"] for each in CONVERSATIONS])
def test_a_conversation_renders_to_the_same_text_and_ids(tokenizer: ModelTokenizer, golden: dict[str, Any]) -> None:
    assert tokenizer.chat_template is not None
    source, origin = tokenizer.chat_template
    template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)
    text = template.render(msgspec.convert(golden["messages"], list[ChatMessage]))
    assert text == golden["text"]
    assert unpack(tokenizer.encode(text, add_special_tokens=False)) == golden["ids"]


def test_texts_encode_to_the_same_ids_with_and_without_bos(tokenizer: ModelTokenizer) -> None:
    for golden in TEXT["encodings"]:
        assert unpack(tokenizer.encode(golden["text"], add_special_tokens=True)) == golden["ids"]
        assert unpack(tokenizer.encode(golden["text"], add_special_tokens=False)) == golden["ids_without_bos"]


@pytest.mark.parametrize("golden", GREEDY, ids=[each["name"] for each in GREEDY])
def test_an_output_streams_to_the_same_text(tokenizer: ModelTokenizer, golden: dict[str, Any]) -> None:
    detokenizer = tokenizer.detokenizer()
    deltas = [detokenizer.push([token_id]) for token_id in golden["output_ids"]]
    assert "".join(deltas) + detokenizer.flush() == golden["text"]
