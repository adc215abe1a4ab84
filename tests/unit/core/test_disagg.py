import pytest

from stator.core.disagg import DisaggPolicy, PrefillRoom, Reason, choose_prefill

ON = DisaggPolicy(remote_prefill=True, conditional_disagg=True, max_local_prefill_length=10, max_prefill_queue_size=2)


def choose(policy: DisaggPolicy = ON, *, prompt: int = 100, cached: int = 0, waiting: int = 0, prefillers: int = 1):
    return choose_prefill(
        policy,
        num_prompt_tokens=prompt,
        num_cached_tokens=cached,
        num_waiting_jobs=waiting,
        num_prefillers=prefillers,
    )


def test_a_long_uncached_prompt_goes_to_a_prefill_instance() -> None:
    assert choose() == choose_prefill(
        ON, num_prompt_tokens=100, num_cached_tokens=0, num_waiting_jobs=0, num_prefillers=1
    )
    assert choose().remote
    assert choose().reason is Reason.LONG


@pytest.mark.parametrize(
    ("prompt", "cached", "remote"), [(10, 0, False), (11, 0, True), (100, 90, False), (100, 89, True), (64, 64, False)]
)
def test_only_the_uncached_part_counts_against_the_local_length(prompt: int, cached: int, remote: bool) -> None:
    choice = choose(prompt=prompt, cached=cached)
    assert choice.remote is remote
    assert choice.reason is (Reason.LONG if remote else Reason.SHORT)


@pytest.mark.parametrize(("waiting", "remote"), [(0, True), (1, True), (2, False), (50, False)])
def test_a_full_queue_keeps_prefill_local(waiting: int, remote: bool) -> None:
    assert choose(waiting=waiting).remote is remote


def test_without_a_prefill_instance_nothing_is_remote_even_unconditionally() -> None:
    always = DisaggPolicy(remote_prefill=True, conditional_disagg=False)
    assert choose(always, prefillers=0).reason is Reason.NO_PREFILL_INSTANCE
    assert not choose(always, prefillers=0).remote


def test_a_prompt_for_an_adapter_that_a_prefill_instance_lacks_is_prefilled_here() -> None:
    for policy in (ON, DisaggPolicy(remote_prefill=True, conditional_disagg=False)):
        choice = choose_prefill(
            policy,
            num_prompt_tokens=100,
            num_cached_tokens=0,
            num_waiting_jobs=0,
            num_prefillers=2,
            adapter_everywhere=False,
        )
        assert (choice.remote, choice.reason) == (False, Reason.NO_ADAPTER)


def test_unconditional_disaggregation_ignores_length_and_queue() -> None:
    always = DisaggPolicy(remote_prefill=True, conditional_disagg=False)
    assert choose(always, prompt=1, waiting=1000).remote


def test_off_is_off() -> None:
    assert not choose(DisaggPolicy(remote_prefill=False), prompt=100_000).remote


def room(**changes: int) -> int:
    values = {
        "jobs_in_hand": 0,
        "tokens_in_hand": 0,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "num_blocks": 64,
        "num_blocks_used": 0,
    }
    return PrefillRoom(**{**values, **changes}).jobs_to_pull()


def test_an_idle_prefill_worker_pulls_even_with_every_block_held() -> None:
    # Held blocks are released by time at the latest, and the engine queues until then: never pulling would wedge.
    assert room(num_blocks_used=64) > 0


def test_a_prefill_worker_takes_several_jobs_but_does_not_hoard() -> None:
    assert 1 < room() <= 8
    assert room(jobs_in_hand=2, tokens_in_hand=200) > 0
    assert room(jobs_in_hand=2, tokens_in_hand=1024) == 0
    assert room(jobs_in_hand=8) == 0
    assert room(jobs_in_hand=7) == 1
    assert room(jobs_in_hand=1, num_blocks_used=60) == 0
