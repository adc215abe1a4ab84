"""Small pieces of `serve`: restarts, tokens, addresses, lines, the terminal, what is printed."""

import io
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.config.external import EtcdSettings, ExternalPlanes, NatsSettings
from stator.errors import ConfigError
from stator.graph import banner, network, sockets, token
from stator.graph.children import LineSplitter, child_environment, describe_exit
from stator.graph.protocol import ExitCode, Serving
from stator.graph.restart import RestartLimits, RestartPolicy
from stator.graph.terminal import Terminal


def test_quick_failures_back_off_and_give_up() -> None:
    policy = RestartPolicy(RestartLimits())
    assert [policy.ended(1, None) for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, None]


def test_a_process_that_ran_well_starts_again_at_once() -> None:
    policy = RestartPolicy(RestartLimits())
    assert policy.ended(1, 3.0) == 0.5
    assert policy.ended(-9, 3.0) == 1.0
    assert policy.ended(-9, 60.0) == 0.5
    assert policy.ended(1, None) == 0.5


def test_delays_are_bounded() -> None:
    policy = RestartPolicy(RestartLimits(max_quick_failures=100))
    assert max(policy.ended(1, None) or 0.0 for _ in range(50)) == 10.0


def test_fencing_is_not_a_failure_and_configuration_is_not_tried_again() -> None:
    policy = RestartPolicy(RestartLimits())
    assert [policy.ended(ExitCode.FENCED, None) for _ in range(20)] == [0.5] * 20
    assert [policy.ended(ExitCode.STALLED, 3.0) for _ in range(20)] == [0.5] * 20
    assert policy.ended(ExitCode.CONFIG, None) is None


def test_a_process_that_was_drained_starts_again_at_once_or_not_at_all() -> None:
    policy = RestartPolicy(RestartLimits())
    policy.ended(1, None)
    assert [policy.ended(ExitCode.RESTART, 1.0) for _ in range(20)] == [0.0] * 20
    assert policy.ended(ExitCode.DRAINED, 1.0) is None
    assert policy.ended(1, None) == 1.0, "it counts neither as a failure nor as a success"


def test_a_name_with_addresses_of_both_families_is_bound_to_its_ipv4_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [six, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with sockets.open_listener("Frontend", "both", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_token_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATOR_TOKEN", raising=False)
    assert token.find_token("a", None) is None
    made = token.make_token("a")
    assert len(made) >= 32
    assert token.make_token("a") == made
    assert token.find_token("a", None) == made
    assert token.find_token("b", None) is None
    path = token.default_token_file("a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["a.token"]
    monkeypatch.setenv("STATOR_TOKEN", "from the environment")
    assert token.find_token("a", None) == "from the environment"


def test_a_token_file_must_be_private_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATOR_TOKEN", raising=False)
    path = tmp_path / "t"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        token.find_token("a", path)
    path.write_text("secret\n")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="may be read by others; run: chmod 600"):
        token.find_token("a", path)
    path.chmod(0o600)
    assert token.find_token("a", path) == "secret"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        token.find_token("a", path)


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 64, "a b"])
def test_namespaces_are_plain_words(name: str) -> None:
    with pytest.raises(ConfigError, match="--namespace"):
        token.check_namespace(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head", ("head", 7440)),
        ("head:1", ("head", 1)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[fe80::1]:80", ("fe80::1", 80)),
        ("fe80::1", ("fe80::1", 7440)),
        ("[fe80::1]", ("fe80::1", 7440)),
    ],
)
def test_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert network.parse_host_port(text, 7440, "--join") == expected


@pytest.mark.parametrize("text", ["", ":1", "h:", "h:x", "h:70000", "h:0"])
def test_wrong_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError, match="--join"):
        network.parse_host_port(text, 7440, "--join")


def test_port_ranges() -> None:
    assert network.parse_port_range("20-30") == (20, 30)
    for text in ("30-20", "20", "a-b", "0-5", "1-70000"):
        with pytest.raises(ConfigError, match="--port-range"):
            network.parse_port_range(text)


def test_what_peers_are_told() -> None:
    assert network.advertised_address("0.0.0.0", "a.b", None) == "a.b"
    assert network.advertised_address("127.0.0.1", None, None) == "127.0.0.1"
    address = network.advertised_address("0.0.0.0", None, None)
    assert address and not network.is_wildcard(address)
    assert network.advertised_address("0.0.0.0", None, ("127.0.0.1", 7440)) == address


@given(st.lists(st.binary(max_size=20), max_size=10), st.data())
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], data: st.DataObject) -> None:
    text = b"\n".join(lines)
    expected = [line.removesuffix(b"\r") for line in text.split(b"\n")[:-1]]
    if rest := text.split(b"\n")[-1]:
        expected.append(rest)
    got: list[bytes] = []
    splitter = LineSplitter(got.append)
    while text:
        size = data.draw(st.integers(1, len(text)))
        splitter.feed(text[:size])
        text = text[size:]
    splitter.end()
    assert got == expected


def test_a_line_without_end_is_cut() -> None:
    got: list[bytes] = []
    splitter = LineSplitter(got.append, max_bytes=4)
    splitter.feed(b"123456789")
    splitter.end()
    assert got == [b"1234", b"5678", b"9"]


def test_children_do_not_inherit_the_token() -> None:
    assert child_environment({"STATOR_TOKEN": "s", "A": "1", "B": "2"}, {"B": "3"}) == {
        "A": "1",
        "B": "3",
        "PYTHONUNBUFFERED": "1",
    }


def test_exits_in_words() -> None:
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was ended by SIGKILL (out of memory?)"
    assert describe_exit(-15) == "was ended by SIGTERM"


def test_lines_carry_their_origin_and_json_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    terminal = Terminal(out, err)
    terminal.child_line("W:1", b"hello", error=False)
    terminal.child_line("W:2", b'{"a":1}', error=True)
    terminal.say("mine")
    terminal.close()
    assert (out.getvalue(), err.getvalue()) == (b"[W:1] hello\nmine\n", b'[W:2] {"a":1}\n')
    monkeypatch.setenv("STATOR_LOG_FORMAT", "json")
    err = io.BytesIO()
    terminal = Terminal(out, err)
    terminal.child_line("W:2", b'{"a":1}', error=True)
    terminal.child_line("W:2", b"oops", error=True)
    terminal.close()
    assert err.getvalue() == b'{"a":1}\n[W:2] oops\n'


def test_a_closed_pipe_does_not_stop_the_terminal() -> None:
    class Broken(io.BytesIO):
        def write(self, data: object) -> int:
            raise BrokenPipeError

    err = io.BytesIO()
    terminal = Terminal(Broken(), err)
    terminal.say("lost")
    terminal.complain("kept")
    terminal.close()
    assert err.getvalue() == b"kept\n"


def test_what_is_printed_can_be_pasted() -> None:
    text = banner.format_serving(Serving("http://0.0.0.0:8000", "it's"), "10.0.0.1")
    assert "http://10.0.0.1:8000/v1/chat/completions" in text
    assert banner.reachable("http://127.0.0.1:8000/", "10.0.0.1") == "http://127.0.0.1:8000"
    assert banner.reachable("http://[::]:8000", "fe80::1") == "http://[fe80::1]:8000"
    line = banner.JoinLine("Worker", ("stator", "serve", "a:W", "--W.x=a b"))
    text = banner.format_join([line], ("10.0.0.1", 7440), "other", "there")
    assert "    stator serve a:W '--W.x=a b' --join 10.0.0.1:7440 --namespace other\n" in text


def test_who_may_join_for_this_frontend_is_told_how() -> None:
    text = banner.format_guests(["b", "c"], "graphs.agg:Processor", ("10.0.0.1", 7440), Path("/a.token"))
    command = "stator serve graphs.agg:Processor -f CONFIG"
    assert f"    {command} --join 10.0.0.1:7440 --token-file /a.token --namespace b\n" in text
    assert text.endswith("--namespace c")
    # The token is read from etcd, or set in the environment.
    assert banner.format_guests(["b"], "graphs.agg:Processor", None, Path("/a.token")).endswith(
        f"    {command} --namespace b"
    )
    assert banner.format_guests([], "graphs.agg:Processor", None, None) == ""


def test_nodes_without_a_hub_are_told_what_to_export() -> None:
    line = banner.JoinLine("PrefillWorker", ("stator", "serve", "components.prefill_worker:PrefillWorker"))
    external = ExternalPlanes(
        EtcdSettings(("http://e1:2379", "http://e2:2379")), NatsSettings(("nats://n:4222",), token="hidden")
    )
    text = banner.format_exports([line], external, "other")
    assert "export NATS_SERVER=nats://n:4222 ETCD_ENDPOINTS=http://e1:2379,http://e2:2379" in text
    assert "stator serve components.prefill_worker:PrefillWorker --namespace other" in text
    assert "NATS_AUTH_*" in text
    assert "hidden" not in text
    plain = ExternalPlanes(external.etcd, NatsSettings(external.nats.servers))
    assert "NATS_AUTH_*" not in banner.format_exports([line], plain, "stator")
