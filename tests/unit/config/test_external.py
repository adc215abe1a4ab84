import pytest

from stator.config.external import EtcdSettings, ExternalPlanes, NatsSettings, TlsFiles, external_planes
from stator.errors import ConfigError

BOTH = {"NATS_SERVER": "nats://n1:4222", "ETCD_ENDPOINTS": "http://e1:2379"}


def planes(**environ: str) -> ExternalPlanes:
    found = external_planes({**BOTH, **environ})
    assert found is not None
    return found


def refusal(**environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        external_planes({**BOTH, **environ})
    return str(caught.value)


def test_nothing_set_is_the_hub() -> None:
    assert external_planes({}) is None
    assert external_planes({"NATS_SERVER": "", "ETCD_ENDPOINTS": ""}) is None


@pytest.mark.parametrize(("present", "missing"), [("NATS_SERVER", "ETCD_ENDPOINTS"), ("ETCD_ENDPOINTS", "NATS_SERVER")])
def test_one_alone_is_refused_and_says_what_to_set(present: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"{present} is set, but {missing} is not\. Set both .*{missing}="):
        external_planes({present: BOTH[present]})


def test_several_addresses_and_default_ports() -> None:
    found = planes(ETCD_ENDPOINTS=" e1, http://e2:99 ,http://[::1] ", NATS_SERVER="n1,nats://n2:5")
    assert found.etcd.endpoints == ("http://e1:2379", "http://e2:99", "http://[::1]:2379")
    assert found.nats.servers == ("nats://n1:4222", "nats://n2:5")
    assert found.shown == (
        "etcd at http://e1:2379, http://e2:99, http://[::1]:2379, NATS at nats://n1:4222, nats://n2:5"
    )


def test_credentials_in_addresses_are_read_and_never_shown() -> None:
    found = planes(ETCD_ENDPOINTS="http://eu:e%40pw@e1,http://eu:e%40pw@e2", NATS_SERVER="nats://nu:npw@n1")
    assert (found.etcd.user, found.etcd.password) == ("eu", "e@pw")
    assert (found.nats.user, found.nats.password) == ("nu", "npw")
    for shown in (repr(found), str(found), found.shown, repr(found.etcd), repr(found.nats)):
        assert "pw" not in shown
    assert "secret" not in refusal(ETCD_ENDPOINTS="ftp://u:secret@e1")
    assert planes(NATS_SERVER="nats://t0ken@n1").nats.token == "t0ken"
    assert "t0ken" not in repr(planes(NATS_SERVER="nats://t0ken@n1"))


def test_credentials_of_their_own_variables_win() -> None:
    found = planes(
        ETCD_AUTH_USERNAME="a", ETCD_AUTH_PASSWORD="b", NATS_SERVER="nats://x:y@n1", NATS_AUTH_USERNAME="u",
        NATS_AUTH_PASSWORD="p",
    )  # fmt: skip
    assert found.etcd == EtcdSettings(("http://e1:2379",), "a", "b")
    assert found.nats == NatsSettings(("nats://n1:4222",), "u", "p")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"ETCD_ENDPOINTS": "e1:port"}, "expected http://HOST:PORT"),
        ({"ETCD_ENDPOINTS": "http://e1/v3"}, "expected http://HOST:PORT"),
        ({"NATS_SERVER": ","}, "NATS_SERVER is empty"),
        ({"NATS_SERVER": "http://n1"}, "expected nats://HOST:PORT"),
        ({"ETCD_ENDPOINTS": "http://a:b@e1,http://c:d@e2"}, "different users"),
        ({"ETCD_AUTH_USERNAME": "a"}, "set ETCD_AUTH_PASSWORD"),
        ({"NATS_AUTH_USERNAME": "a"}, "set NATS_AUTH_PASSWORD"),
        ({"NATS_AUTH_TOKEN": "a", "NATS_SERVER": "nats://u:p@n"}, "a user and a token are given"),
        ({"NATS_AUTH_NKEY": "/no/such/file"}, "NATS_AUTH_NKEY=/no/such/file: there is no such file"),
        ({"ETCD_AUTH_CA": "/dev/null/x"}, "there is no such file"),
    ],
)
def test_what_cannot_be_used_says_why(environ: dict[str, str], says: str) -> None:
    assert says in refusal(**environ)


def test_tls_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("tls")
    ca, cert, key = (str(directory / name) for name in ("ca", "cert", "key"))
    for path in (ca, cert, key):
        with open(path, "w") as file:
            file.write("not a certificate")
    files = {"ETCD_AUTH_CA": ca, "ETCD_AUTH_CLIENT_CERT": cert, "ETCD_AUTH_CLIENT_KEY": key}
    found = planes(ETCD_ENDPOINTS="https://e1", **files)
    assert found.etcd.tls == TlsFiles(ca, cert, key)
    with pytest.raises(ConfigError, match="cannot be used"):
        found.etcd.tls.context()
    assert "must be https://" in refusal(**files)
    assert "belong together" in refusal(ETCD_ENDPOINTS="https://e1", ETCD_AUTH_CLIENT_CERT=cert)
    assert planes(NATS_SERVER="tls://n1").nats.tls == TlsFiles()
    assert planes(NATS_AUTH_CA=ca).nats.tls == TlsFiles(ca)
