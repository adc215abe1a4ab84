"""A process that makes prompts for a Processor, which kills it when one takes too long. Its argument is the model's
directory."""

import sys
from pathlib import Path

import msgspec

from stator.runtime import killable_child

killable_child.guard()

from stator.processor.chat_template import ChatTemplate  # noqa: E402 - after the guard
from stator.processor.prompt_jobs import PromptJob, PromptMaker  # noqa: E402
from stator.processor.tokenizer import ModelTokenizer  # noqa: E402


def main(model_dir: Path) -> None:
    tokenizer = ModelTokenizer.load(model_dir)
    template = None
    if tokenizer.chat_template is not None:
        source, origin = tokenizer.chat_template
        template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)
    maker = PromptMaker(tokenizer, template)
    jobs = msgspec.msgpack.Decoder(PromptJob)
    killable_child.serve(lambda payload: msgspec.msgpack.encode(maker.make(jobs.decode(payload))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
