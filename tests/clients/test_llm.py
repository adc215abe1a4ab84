"""The command `llm`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.programs import (
    ENVIRONMENT,
    MODEL,
    QUESTION,
    Deployment,
    RunClient,
    assert_is_mood,
)

pytestmark = pytest.mark.timeout(240)

MOOD = {
    "type": "object",
    "properties": {
        "mood": {"type": "string", "enum": ["calm", "cross"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["mood", "age"],
    "additionalProperties": False,
}
LLM_MODELS = """
- model_id: ours
  model_name: {model}
  api_base: {url}
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture(scope="module")
def llm(run_client: RunClient, deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    settings = tmp_path_factory.mktemp("llm")
    (settings / "extra-openai-models.yaml").write_text(LLM_MODELS.format(model=MODEL, url=deployment.url))

    def run(*arguments: str) -> str:
        return run_client([Path(ENVIRONMENT, "bin", "llm"), *arguments], LLM_USER_PATH=str(settings))

    return run


def test_it_chats_and_streams(llm: Callable[..., str], deployment: Deployment) -> None:
    asked = ("-m", "ours", "-s", "Be short.", "-o", "temperature", "0", "-o", "max_tokens", "12", QUESTION)
    assert llm(*asked).rstrip("\n") == llm(*asked, "--no-stream").rstrip("\n") == deployment.text
    streamed, whole = json.loads(llm("logs", "-n", "2", "--json"))
    for logged in (streamed, whole):
        assert logged["response"] == deployment.text
        assert (logged["input_tokens"], logged["output_tokens"]) == deployment.num_tokens[:2]


def test_it_gets_the_form_it_asks_for(llm: Callable[..., str]) -> None:
    assert_is_mood(json.loads(llm("-m", "ours", "--schema", json.dumps(MOOD), QUESTION)))


def test_it_offers_tools(llm: Callable[..., str]) -> None:
    """It cannot force a call, and the bundled model makes none by itself."""
    function = 'def look(at: str) -> str:\n    "Look at something."\n    return at'
    assert llm("-m", "ours", "--functions", function, "-o", "max_tokens", "12", QUESTION).strip()


def test_it_takes_an_address_without_settings(llm: Callable[..., str], deployment: Deployment) -> None:
    assert MODEL in llm("openai", "endpoint", deployment.url, "--models")
    asked = ("-s", "Be short.", "-o", "temperature", "0", "-o", "max_tokens", "12", QUESTION)
    assert llm("openai", "endpoint", deployment.url, "-m", MODEL, *asked).rstrip("\n") == deployment.text
