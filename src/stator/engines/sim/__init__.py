"""The local engine's scheduler and blocks with a timing model in place of the model: load tests without a GPU."""
