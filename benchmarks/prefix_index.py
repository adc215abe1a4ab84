"""Cost of the router's KV index at 1,000 workers: events applied, lookups, memory, deaths; and of hashing prompts.

python benchmarks/prefix_index.py [--quick]

Workload: conversations of 125 blocks (8k tokens in blocks of 64), of which the first 32 are one of 40 system prompts;
each conversation is held by three workers, so that a system prompt is held by about 250. Some prompts have 100k tokens.
All figures are CPU time of this process, the best of some rounds.
"""

import argparse
import gc
import time
from collections.abc import Callable
from random import Random

import msgspec
import psutil

from stator.core.hashing import block_hashes
from stator.core.kv_stream import KvSource, KvView, KvViewStats, Received
from stator.core.prefix_index import PrefixIndex
from stator.messages.engine import BlocksRemoved, BlocksStored
from stator.messages.kv_events import KvItem
from stator.messages.tokens import pack

NUM_SYSTEM_BLOCKS = 32
NUM_BLOCKS = 125
NUM_LONG_BLOCKS = 1_562
HOLDERS = 3

Prompt = list[int]
Index = PrefixIndex[str]


def cpu_s(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def best_us(step: Callable[[], object], rounds: int, repeat: int = 5) -> float:
    """CPU microseconds of one step: the best of `repeat` runs, since noise only adds."""

    def run() -> None:
        for _ in range(rounds):
            step()

    return min(cpu_s(run) for _ in range(repeat)) / rounds * 1e6


class Deployment:
    """Workers, what each of them holds, and an index filled through their event streams."""

    def __init__(self, num_workers: int, num_prompts: int, max_entries: int) -> None:
        self.rng = Random(1)
        self.index: Index = PrefixIndex(max_entries=max_entries)
        self.stats = KvViewStats()
        names = [f"worker-{number}" for number in range(num_workers)]
        self.views = {name: KvView(self.index, name, self.stats) for name in names}
        systems = [self._hashes(NUM_SYSTEM_BLOCKS) for _ in range(40)]
        self.prompts = [s + self._hashes(NUM_BLOCKS - NUM_SYSTEM_BLOCKS) for s in systems * (num_prompts // 40)]
        self.long_prompts = [self.rng.choice(systems) + self._hashes(NUM_LONG_BLOCKS - NUM_SYSTEM_BLOCKS)]
        self.long_prompts += [self.rng.choice(systems) + self._hashes(NUM_LONG_BLOCKS - NUM_SYSTEM_BLOCKS)]
        self.sources = {name: KvSource(1) for name in names}
        self.held: dict[str, list[Prompt]] = {name: [] for name in names}
        for prompt in [*self.prompts, *self.long_prompts]:
            for name in self.rng.sample(names, HOLDERS):
                self.held[name].append(prompt)

    def _hashes(self, count: int) -> Prompt:
        return [self.rng.getrandbits(64) for _ in range(count)]

    def open_all(self) -> None:
        for name, view in self.views.items():
            view.open()
            for chunk in self.sources[name].snapshot():
                view.receive(chunk)

    def stored_items(self) -> tuple[list[tuple[str, bytes]], float]:
        """What the workers send, encoded, when each runs its prompts; and the CPU seconds that took them."""
        encode = msgspec.msgpack.Encoder().encode
        items: list[tuple[str, bytes]] = []

        def run() -> None:
            for name, prompts in self.held.items():
                for prompt in prompts:
                    self.sources[name].apply([BlocksStored(list(prompt))])
                    items.extend((name, encode(item)) for item in self.sources[name].take_changes())

        seconds = cpu_s(run)
        return items, seconds

    def removed_items(self) -> list[tuple[str, bytes]]:
        """What they send when each evicts half of what it holds, 16 blocks at a time, tails first."""
        encode = msgspec.msgpack.Encoder().encode
        items: list[tuple[str, bytes]] = []
        for name, prompts in self.held.items():
            for prompt in prompts[::2]:
                for end in range(NUM_BLOCKS, NUM_SYSTEM_BLOCKS + 16, -16):
                    self.sources[name].apply([BlocksRemoved(prompt[end - 16 : end][::-1])])
                    items.extend((name, encode(item)) for item in self.sources[name].take_changes())
        return items

    def receive(self, items: list[tuple[str, bytes]]) -> float:
        """Apply encoded items; blocks per CPU second, decoding included."""
        decode = msgspec.msgpack.Decoder(KvItem).decode
        before = self.stats.num_events

        def run() -> None:
            for name, data in items:
                assert self.views[name].receive(decode(data)) is Received.PROGRESS

        seconds = cpu_s(run)
        return (self.stats.num_events - before) / seconds


def events(deployment: Deployment) -> None:
    gc.collect()
    items, seconds = deployment.stored_items()
    num_blocks = sum(len(prompt) for prompts in deployment.held.values() for prompt in prompts)
    print(f"{'worker: events to bytes':<44} {num_blocks / seconds / 1e6:8.2f} M blocks/s")
    gc.collect()
    rss = psutil.Process().memory_info().rss
    rate = deployment.receive(items)
    gc.collect()
    index = deployment.index
    grown = psutil.Process().memory_info().rss - rss
    pairs = deployment.stats.num_events
    print(f"{'router: stored, bytes to index':<44} {rate / 1e6:8.2f} M blocks/s   ({pairs:,} pairs)")
    entries = index.num_entries
    print(f"{'memory per distinct block (process grew)':<44} {grown / entries:8.0f} bytes        ({entries:,} blocks)")
    print(f"{'memory per distinct block (reported)':<44} {index.memory_bytes / entries:8.0f} bytes")


def lookups(deployment: Deployment, rounds: int) -> None:
    index, rng = deployment.index, deployment.rng
    misses = [[rng.getrandbits(64) for _ in range(NUM_BLOCKS)] for _ in range(100)]
    fresh = [p[:NUM_SYSTEM_BLOCKS] + misses[0][NUM_SYSTEM_BLOCKS:] for p in deployment.prompts]
    cases = [
        ("8k tokens, a conversation goes on", deployment.prompts),
        ("8k tokens, a new one on a system prompt", fresh),
        ("8k tokens, miss", misses),
        ("100k tokens, goes on", deployment.long_prompts),
    ]
    for name, prompts in cases:
        prompts = rng.sample(prompts, min(rounds, len(prompts)))

        def run(prompts: list[Prompt] = prompts) -> None:
            for prompt in prompts:
                index.overlaps(prompt)

        microseconds = best_us(run, 1 if len(prompts) > 10 else rounds // len(prompts)) / len(prompts)
        found = sum(len(index.overlaps(prompt)) for prompt in prompts) / len(prompts)
        print(f"{'lookup: ' + name:<52} {microseconds:8.1f} us   {1e6 / microseconds:9,.0f}/s   ({found:.0f} found)")


def restart(deployment: Deployment) -> None:
    """A new router takes the snapshots of all workers."""
    encode = msgspec.msgpack.Encoder().encode
    decode = msgspec.msgpack.Decoder(KvItem).decode
    chunks = {name: [encode(chunk) for chunk in source.snapshot()] for name, source in deployment.sources.items()}
    index: Index = PrefixIndex()
    stats = KvViewStats()
    gc.collect()

    def run() -> None:
        for name, items in chunks.items():
            view = KvView(index, name, stats)
            view.open()
            for data in items:
                view.receive(decode(data))

    seconds = cpu_s(run)
    print(f"{'restart of a router: snapshots of all workers':<44} {seconds:8.2f} s   ({stats.num_events:,} pairs)")


def removals(deployment: Deployment) -> None:
    gc.collect()
    rate = deployment.receive(deployment.removed_items())
    print(f"{'router: removed, bytes to index':<44} {rate / 1e6:8.2f} M blocks/s   (16 an item)")


def deaths(deployment: Deployment) -> None:
    index = deployment.index
    name, view = next(iter(deployment.views.items()))
    print(f"{'death of a worker':<52} {cpu_s(view.close) * 1e6:8.1f} us")
    times: list[float] = []
    while index.needs_cleaning:
        times.append(cpu_s(index.clean))
    print(f"{f'cleaning after it, longest of {len(times)} calls':<52} {max(times) * 1e6:8.1f} us")
    del deployment.views[name], deployment.held[name]


def hashing(rounds: int) -> None:
    for num_tokens in (8_000, 100_000):
        prompt = pack(range(num_tokens))
        for block_size in (64, 16):

            def run(prompt: bytes = prompt, block_size: int = block_size) -> None:
                block_hashes(prompt, block_size, model="m")

            microseconds = best_us(run, max(3, rounds * 8_000 // num_tokens))
            print(f"{f'hashing {num_tokens:,} tokens in blocks of {block_size}':<52} {microseconds:8.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    quick = parser.parse_args().quick
    deployment = Deployment(50 if quick else 1_000, 200 if quick else 4_000, 8_000_000)
    deployment.open_all()
    events(deployment)
    lookups(deployment, 100 if quick else 1_000)
    restart(deployment)
    removals(deployment)
    deaths(deployment)
    hashing(20 if quick else 200)


if __name__ == "__main__":
    main()
