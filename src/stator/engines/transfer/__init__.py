"""KV blocks between two engines over the request plane: what they say, who serves, who fetches."""
