import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.errors import ConfigError
from stator.graph.gpus import GB, Gpu, GpuRequest, allocate, describe, parse_assumed, visible
from stator.graph.machine import parse_nvidia_smi


def ids(requests: list[tuple[str, float]], num_gpus: int) -> dict[str, str]:
    gpus = [Gpu(str(index)) for index in range(num_gpus)]
    given = allocate([GpuRequest(label, amount) for label, amount in requests], gpus)
    return {label: ",".join(gpu.id for gpu in gpus) for label, gpus in given.items()}


def test_whole_gpus_are_given_once() -> None:
    assert ids([("F:1", 0), ("A:1", 2), ("A:2", 2), ("B:1", 4)], 8) == {
        "F:1": "",
        "A:1": "0,1",
        "A:2": "2,3",
        "B:1": "4,5,6,7",
    }


def test_fractions_share_and_never_with_a_whole_one() -> None:
    assert ids([("A:1", 0.5), ("A:2", 0.5), ("A:3", 0.5), ("B:1", 1)], 3) == {
        "A:1": "1",
        "A:2": "1",
        "A:3": "2",
        "B:1": "0",
    }
    assert set(ids([(f"A:{i}", 0.1) for i in range(10)], 1).values()) == {"0"}


def test_a_shortage_says_asked_there_and_by_whom() -> None:
    with pytest.raises(ConfigError) as caught:
        ids([("F:1", 0), ("VllmWorker:1", 8), ("PrefillWorker:1", 8)], 8)
    text = str(caught.value)
    assert "16 asked (VllmWorker:1 8, PrefillWorker:1 8), 8 there (0, 1, 2, 3, 4, 5, 6, 7)" in text
    with pytest.raises(ConfigError, match=r"1\.5 asked \(A:1 0.5, B:1 1\), 1 there \(0\)\. Lower"):
        ids([("A:1", 0.5), ("B:1", 1)], 1)
    with pytest.raises(ConfigError, match=r"1\.8 asked .* 2 there .* cannot share|1\.8 asked"):
        ids([("A:1", 0.6), ("A:2", 0.6), ("A:3", 0.6)], 2)


@given(st.lists(st.sampled_from([0, 0.25, 0.5, 0.75, 1, 2, 3]), max_size=8), st.integers(0, 8))
def test_nobody_gets_more_or_less_than_asked(amounts: list[float], num_gpus: int) -> None:
    try:
        given = ids([(f"P:{i}", amount) for i, amount in enumerate(amounts)], num_gpus)
    except ConfigError:
        return
    load: dict[str, float] = {}
    for index, amount in enumerate(amounts):
        own = [gpu for gpu in given[f"P:{index}"].split(",") if gpu]
        assert len(own) == len(set(own)) == (int(amount) if amount >= 1 else int(amount > 0))
        for gpu in own:
            load[gpu] = load.get(gpu, 0) + min(amount, 1)
    assert all(total <= 1 for total in load.values())


def test_an_outer_choice_is_kept() -> None:
    machine = [Gpu(str(index), "H100", 80 * GB) for index in range(4)]
    assert [gpu.id for gpu in visible(machine, None)] == ["0", "1", "2", "3"]
    assert [gpu.id for gpu in visible(machine, "3,1")] == ["3", "1"]
    assert visible(machine, "") == []
    assert [gpu.id for gpu in visible(machine, "2,9,1")] == ["2"]
    assert [gpu.id for gpu in visible(machine, "-1")] == []
    assert [gpu.id for gpu in visible(machine, "GPU-8f,1")] == ["GPU-8f", "1"]
    assert [gpu.id for gpu in visible([], "0,1")] == ["0", "1"]


def test_assumed_gpus() -> None:
    assert parse_assumed("8xH100-80GB") == [Gpu(str(index), "H100", 80 * GB) for index in range(8)]
    assert parse_assumed("2xRTX 6000-48gb")[1] == Gpu("1", "RTX 6000", 48 * GB)
    assert parse_assumed("4xA100-SXM4")[0] == Gpu("0", "A100-SXM4")
    assert parse_assumed("3") == [Gpu("0"), Gpu("1"), Gpu("2")]
    for text in ("", "x", "8x", "H100", "-1xA"):
        with pytest.raises(ConfigError, match="expected COUNTxNAME-MEMORY"):
            parse_assumed(text)


def test_in_words() -> None:
    assert describe(parse_assumed("8xH100-80GB")) == "8 x H100, 80 GB"
    assert describe([]) == "none"


def test_what_nvidia_smi_prints() -> None:
    gpus = parse_nvidia_smi("0, NVIDIA H100 80GB HBM3, 81559\n1, NVIDIA H100 80GB HBM3, 81559\n")
    assert [gpu.id for gpu in gpus] == ["0", "1"]
    assert gpus[1].name == "NVIDIA H100 80GB HBM3" and round(gpus[1].memory_bytes / GB) == 86
    with pytest.raises(ValueError):
        parse_nvidia_smi("No devices were found")
