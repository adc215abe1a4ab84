import pytest

from stator.core.public_errors import TOLD, told
from stator.core.public_text import MAX_CHARS, NOT_TOLD, harmless
from stator.errors import ERRORS, ErrorCode, Fault, StatorError

INTERNAL = [
    "cannot connect to tcp://10.0.0.3:4711: refused",
    "[Errno 2] No such file: /opt/models/a/config.json",
    "<vllm.Engine object at 0x7f0012ab34cd>",
    'File "engine.py", line 3',
    "Traceback (most recent call last):",
    "torch.cuda.alloc(5) failed",
    "<class 'numpy.ndarray'>",
]
HARMLESS = [
    "Invalid grammar: unexpected token at line 1",
    "regex parse error: unclosed group",
    "#/$defs/person and #/definitions/person are not there",
    "a/b is neither a nor b; 1.5 of 3.0",
]


@pytest.mark.parametrize("text", INTERNAL)
def test_what_shows_the_machine_or_the_code_is_not_told(text: str) -> None:
    assert harmless(text) == NOT_TOLD
    error = told(StatorError(ErrorCode.NO_INSTANCE, text, param="p", retry_after_s=2.0))
    assert text not in error.message
    assert (error.code, error.param, error.retry_after_s) == (ErrorCode.NO_INSTANCE, "p", 2.0)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_shows_nothing_is_told(text: str) -> None:
    assert harmless(text) == text
    assert harmless(f"\n  {text}\n/opt/engine/grammar.py says so") == text
    error = StatorError(ErrorCode.OVERLOADED, text)
    assert told(error) is error


def test_a_long_text_is_cut_and_an_empty_one_not_told() -> None:
    assert harmless("a" * 1000) == "a" * MAX_CHARS + "..."
    assert harmless(" \n") == NOT_TOLD


def test_a_client_reads_back_what_it_wrote_itself() -> None:
    error = StatorError(ErrorCode.INVALID_REQUEST, "The model '/opt/models/a' does not exist", param="model")
    assert told(error) is error


def test_every_failure_of_a_peer_has_a_sentence_or_is_written_for_clients() -> None:
    for code, info in ERRORS.items():
        if info.fault is Fault.PEER:
            assert code in TOLD or code in (ErrorCode.POISON_REQUEST, ErrorCode.NOT_RESUMABLE)
