"""CPU cost of the Processor's own work: per request (render, encode, hash) and per streamed token (text, stop strings).

python benchmarks/processor.py [--quick] [--model DIR]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import stator
from stator.core.hashing import block_hashes
from stator.messages.openai import ChatMessage
from stator.messages.tokens import num_tokens, unpack
from stator.processor.chat_template import ChatTemplate
from stator.processor.output import OutputText
from stator.processor.tokenizer import ModelTokenizer

WORDS = "And the king said unto him, Why doth the little fox sing by the river in the morning? "


def best_us(step: Callable[[], object], rounds: int, repeat: int = 5) -> float:
    """CPU microseconds of one step: the best of `repeat` runs, since noise only adds."""
    runs: list[float] = []
    for _ in range(repeat):
        start = time.process_time()
        for _ in range(rounds):
            step()
        runs.append(time.process_time() - start)
    return min(runs) / rounds * 1e6


def per_request(tokenizer: ModelTokenizer, quick: bool) -> None:
    assert tokenizer.chat_template is not None
    source, origin = tokenizer.chat_template
    template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)
    print(f"{'request':>16} {'render':>9} {'encode':>9} {'hash':>9}   CPU us")
    for repetitions in (1, 40) if quick else (1, 40, 400):
        messages = [ChatMessage("system", "You tell stories."), ChatMessage("user", WORDS * repetitions)]
        text = template.render(messages)
        ids = tokenizer.encode(text, add_special_tokens=False)
        rounds = max(3, (40 if quick else 400) // repetitions)
        render = best_us(lambda m=messages: template.render(m), rounds)
        encode = best_us(lambda t=text: tokenizer.encode(t, add_special_tokens=False), rounds)
        hashing = best_us(lambda i=ids: block_hashes(i, 64, model="m"), rounds)
        print(f"{num_tokens(ids):>9} tokens {render:9.1f} {encode:9.1f} {hashing:9.1f}")


def per_token(tokenizer: ModelTokenizer, quick: bool) -> None:
    text = (WORDS + "Grüße, 東京 🙂. ") * (5 if quick else 50)
    ids = unpack(tokenizer.encode(text, add_special_tokens=False))
    print(f"\n{'stop strings':>16} {'tokens a push':>14}   CPU us per token")
    for stops in ((), ("\n\n", "<end>"), ("the river runs", "Why not", "king said no", "###")):
        for size in (1, 4):
            pieces = [ids[at : at + size] for at in range(0, len(ids), size)]

            def stream(stops: tuple[str, ...] = stops, pieces: list[list[int]] = pieces) -> None:
                output = OutputText(tokenizer.detokenizer(), stops, min_tokens=0, stop_ids=tokenizer.eos_ids)
                shown = [output.push(piece) for piece in pieces]
                shown.append(output.push_last((), stopped=False))
                assert sum(map(len, shown)) == len(text)

            print(f"{len(stops):>16} {size:>14} {best_us(stream, 3) / len(ids):9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--model", type=Path, default=Path(stator.__file__).parent / "models" / "tiny-llama")
    arguments = parser.parse_args()
    tokenizer = ModelTokenizer.load(arguments.model)
    per_request(tokenizer, arguments.quick)
    per_token(tokenizer, arguments.quick)


if __name__ == "__main__":
    main()
