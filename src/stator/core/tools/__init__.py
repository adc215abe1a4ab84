"""Tool calls in what a model writes: found while it streams, and described so that a grammar can force them.

- `events`: what comes out of every parser here and in `core.reasoning`.
- `reader`, `json_text`, `schema_types`, `base`: what the families share.
- `hermes`, `json_array`, `llama_json`, `mistral`, `deepseek`, `qwen_xml`, `pythonic`, `harmony`: one format each.
- `registry`: parsers by name. `core.parser_choice` picks names for a model, `core.output_parser` composes a whole.
- `grammar`, `forced`: what must be generated when a request forces a call.
- `request`: the request's fields, checked.

What every parser promises, whatever the cuts of the text (tests/unit/core/tools):

- The events, with neighbours of one kind joined, are a function of the whole text.
- Text that turns out not to be a call is content, unchanged. It is never looked at twice, so time is linear.
- A call starts once its name is known and its arguments begin; it is never taken back. Arguments are handed on as they
  come: concatenated they are the model's own JSON text, with raw control characters in strings escaped (models write
  raw newlines there), or JSON made from what a format has instead.
- A call that the output's end, a broken structure or a bound cuts short is ended with `complete=False` and what there
  is; text from the break on is content. Inside balanced brackets the text is not checked: `{"a": maybe}` is handed on.
- Names nobody declared: where a format marks its calls, they are calls all the same (the client can answer them, and
  markup in the text would help nobody); where a call is only told by its looks (Llama's JSON, a pythonic list), the
  text is content.
- What is held is bounded by `Limits`; text past a bound is content.
"""
