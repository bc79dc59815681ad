"""`[telemetry]`, `[telemetry.otlp]` and `[http]`: what they mean, and what is refused."""

from pathlib import Path

import pytest

from dbtstream.config import Config, load_config, split_listen
from dbtstream.errors import ConfigError
from dbtstream.otel_sdk import make_resource, signal_url
from dbtstream.telemetry import otlp_headers


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "dbtstream.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, {})


def test_without_tables_metrics_are_on_loopback_and_nothing_is_sent() -> None:
    config = load_config(None, {})
    assert config.http.listen == "127.0.0.1:9464"
    assert config.telemetry.otlp is None


def test_the_environment_can_switch_otlp_on() -> None:
    config = load_config(None, {"DBTSTREAM__TELEMETRY__OTLP__ENDPOINT": "http://collector:4318"})
    assert config.telemetry.otlp is not None
    assert config.telemetry.otlp.endpoint == "http://collector:4318"


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("[http]\nlisten = '9464'", "http.listen", "is no address"),
        ("[http]\nlisten = 'host'", "http.listen", "is no address"),
        ("[http]\nlisten = 'host:port'", "http.listen", "is no address"),
        ("[http]\nlisten = 'http://host:1'", "http.listen", "is no address"),
        ("[http]\nlisten = 'host:70000'", "http.listen", "is no address"),
        ("[telemetry]\nservice_name = ' '", "telemetry.service_name", "is empty"),
        (
            "[telemetry.resource]\n'service.name' = 'x'",
            "telemetry.resource.service.name",
            "has a key of its own",
        ),
        ("[telemetry.resource]\n'' = 'x'", "telemetry.resource.", "is no attribute"),
        ("[telemetry]\nbaggage = ['a b']", "telemetry.baggage", "cannot be a key"),
        ("[telemetry]\ntrace_context = 'child'", "telemetry.trace_context", "child"),
        ("[telemetry.otlp]\nendpoint = 'host:4318'", "telemetry.otlp.endpoint", "is no address"),
        (
            "[telemetry.otlp]\nendpoint = 'http://u:p@host'",
            "telemetry.otlp.endpoint",
            "has more than",
        ),
        (
            "[telemetry.otlp]\nendpoint = 'http://host/v1/traces'",
            "telemetry.otlp.endpoint",
            "is that of one signal",
        ),
        ("[telemetry.otlp]\ntimeout_s = 0.0", "telemetry.otlp.timeout_s", "must be above 0"),
        (
            "[telemetry.otlp]\nmetrics_interval_s = -1.0",
            "telemetry.otlp.metrics_interval_s",
            "must be above 0",
        ),
        (
            "[telemetry.otlp]\ntraces = false\nmetrics = false",
            "telemetry.otlp.traces",
            "so are metrics and logs",
        ),
        (
            "[telemetry.otlp.headers]\n'a b' = 'x'",
            "telemetry.otlp.headers.a b",
            "is no HTTP header",
        ),
        (
            '[telemetry.otlp.headers]\nx = "a\\nb"',
            "telemetry.otlp.headers.x",
            "is no HTTP header",
        ),
        (
            "[telemetry.otlp]\nheaders = { Key = 'x' }\nsecret_headers = { key = { env = 'K' } }",
            "telemetry.otlp.secret_headers.key",
            "is also in headers",
        ),
    ],
)
def test_what_cannot_mean_anything_is_refused(
    tmp_path: Path, text: str, key: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    assert refused.value.key == key
    assert problem in refused.value.problem


@pytest.mark.parametrize(
    ("listen", "split"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),  # noqa: S104
        ("[::1]:9464", ("::1", 9464)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_addresses(listen: str, split: tuple[str, int]) -> None:
    assert split_listen(listen) == split


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("", None),
        ("http://c:4318", "http://c:4318/v1/metrics"),
        ("https://c/otlp/", "https://c/otlp/v1/metrics"),
    ],
)
def test_each_signal_has_its_path(endpoint: str, url: str | None) -> None:
    assert signal_url(endpoint, "metrics") == url


def test_secrets_and_files_count_from_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n", encoding="utf-8")
    config = load(
        tmp_path,
        "[telemetry.otlp]\ntls_ca_file = 'ca.pem'\nheaders = { X-Team = 'data' }\n"
        "secret_headers = { api-key = { file = 'key' } }",
    )
    assert config.telemetry.otlp is not None
    assert config.telemetry.otlp.tls_ca_file == str(tmp_path / "ca.pem")
    assert otlp_headers(config) == {"X-Team": "data", "api-key": "s3cret"}


def test_a_secret_that_is_missing_is_named_and_not_shown(tmp_path: Path) -> None:
    config = load(tmp_path, "[telemetry.otlp.secret_headers]\napi-key = { env = 'NO_SUCH_KEY' }")
    with pytest.raises(ConfigError, match=r"secret_headers\.api-key: .*NO_SUCH_KEY is not set"):
        otlp_headers(config)


class TestResource:
    """The config wins over OpenTelemetry's variables, and those over our defaults."""

    def attributes(self, tmp_path: Path, text: str = "") -> dict[str, object]:
        return dict(make_resource(load(tmp_path, text)).attributes)

    def test_by_default(self, tmp_path: Path) -> None:
        found = self.attributes(tmp_path, "[worker]\nname = 'w1'")
        assert found["service.name"] == "dbtstream"
        assert found["service.instance.id"] == "w1"
        assert "service.namespace" not in found

    def test_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "from-env")
        monkeypatch.setenv(
            "OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod-7,team=data,service.namespace=a"
        )
        found = self.attributes(tmp_path)
        assert found["service.name"] == "from-env"
        assert (found["service.instance.id"], found["team"]) == ("pod-7", "data")

        text = """
            [worker]
            name = "w1"
            [telemetry]
            service_name = "mine"
            service_namespace = "b"
            environment = "production"
            [telemetry.resource]
            team = "platform"
        """
        found = self.attributes(tmp_path, text)
        assert found["service.name"] == "mine"
        assert (found["service.instance.id"], found["team"]) == ("w1", "platform")
        assert found["service.namespace"] == "b"
        assert found["deployment.environment.name"] == "production"
