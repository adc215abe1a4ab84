"""Reasoning told from the answer in what a model writes: `tags` between two markers, `granite` behind phrases.

gpt-oss's channels carry reasoning and calls alike: `core.tools.harmony` reads both. The parsers keep the promises of
`core.tools`: events are a function of the whole text, nothing is lost but markup, time is linear.
"""
