"""compose.yaml without Docker: a compose-spec parser takes it, and it agrees with its files."""

import re
from pathlib import Path
from typing import Any

import compose_spec
import pytest

from dbtstream.config import Config, load_config
from dbtstream.daemon import stop_budget_s
from tests.deploy import DEPLOY, ROOT, instructions, read_yaml, seconds

FILE = DEPLOY / "compose.yaml"
SPEC: dict[str, Any] = read_yaml(FILE)
SERVICES: dict[str, dict[str, Any]] = SPEC["services"]

LISTENS = {
    "nats": {4222},
    "dbtstream": {9464},
    "prometheus": {9090},
    "grafana": {3000},
    "tempo": {3200, 4317},
    "otel-collector": {4318},
}
"""Where each one waits for the others, in the network of the file."""

NO_HEALTHCHECK = {"otel-collector", "tempo"}
"""Images without a shell."""

WRITABLE_ROOT = {"grafana"}
"""Images that write beside their volumes."""


def parsed(text: str) -> compose_spec.PyCompose:
    return compose_spec.PyOptions(apply_merge=True).from_yaml(text)


def mounts(service: str) -> list[tuple[str, str, str]]:
    """Source, target and mode of each."""
    found = []
    for text in SERVICES[service].get("volumes", []):
        source, target, *mode = text.split(":")
        found.append((source, target, mode[0] if mode else "rw"))
    return found


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """docker/dbtstream.toml as the container has it, but for where the project is."""
    text = (DEPLOY / "docker" / "dbtstream.toml").read_text(encoding="utf-8")
    (tmp_path / "dbt_project.yml").touch()
    copy = tmp_path / "dbtstream.toml"
    copy.write_text(text.replace('path = "/srv/flights"', f'path = "{tmp_path}"'), "utf-8")
    (environment,) = (
        dict(re.findall(r"(\w+)=(\S+)", rest))
        for name, rest in instructions(DEPLOY / "docker" / "Dockerfile")
        if name == "ENV"
    )
    return load_config(copy, environment)


def test_a_compose_parser_takes_it() -> None:
    compose = parsed(FILE.read_text(encoding="utf-8"))
    compose.validate()
    assert compose.service_names() == list(SERVICES)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("read_only: true", "read_onl: true"),
        ("stop_grace_period: 160s", "stop_grace_period: 160x"),
        ("condition: service_healthy", "condition: healthy"),
        ("restart: unless-stopped", "restart: sometimes"),
    ],
)
def test_the_parser_would_not_take_a_slip(right: str, wrong: str) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(ValueError, match=r"read_onl|unit|unknown variant"):
        parsed(text.replace(right, wrong, 1)).validate()


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"]), name
    assert SERVICES["dbtstream"]["build"] == {
        "context": "..",
        "dockerfile": "deploy/docker/Dockerfile",
    }
    assert (ROOT / "deploy" / "docker" / "Dockerfile").is_file()
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    server = SERVICES["nats"]["image"].split(":")[1].removesuffix("-alpine")
    assert f"\nnats-server-bin=={server}\n" in pinned, "not the server that the tests run with"


@pytest.mark.parametrize("service", SERVICES)
def test_what_it_mounts_is_there(service: str) -> None:
    for source, target, mode in mounts(service):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
            assert mode == "ro"
        else:
            assert source in SPEC["volumes"]
            assert mode == "rw"
        assert target.startswith("/")


def test_every_volume_is_mounted() -> None:
    used = {source for service in SERVICES for source, _, _ in mounts(service)}
    assert set(SPEC["volumes"]) <= used


@pytest.mark.parametrize("service", SERVICES)
def test_each_is_restarted_held_down_and_looked_after(service: str) -> None:
    found = SERVICES[service]
    assert found["restart"] == "unless-stopped"
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found.get("read_only", False) is (service not in WRITABLE_ROOT)
    # The daemon's is in its image.
    looked_after = "healthcheck" in found or service == "dbtstream"
    assert looked_after is (service not in NO_HEALTHCHECK)
    for other, how in found.get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other]


def test_what_is_published_is_published_on_the_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"nats", "prometheus", "grafana"}
    for name, ports in published.items():
        for port in ports:
            host, outside, inside = port.split(":")
            assert host == "127.0.0.1"
            assert outside == inside
            assert int(inside) in LISTENS[name]


def test_docker_waits_longer_than_all_steps_of_a_stop_together(config: Config) -> None:
    assert seconds(SERVICES["dbtstream"]["stop_grace_period"]) > stop_budget_s(config.worker)


def test_the_daemon_is_told_of_services_that_are_there(config: Config) -> None:
    assert config.telemetry.otlp is not None
    for url in (*config.nats.servers, config.telemetry.otlp.endpoint):
        host, port = url.partition("://")[2].split(":")
        assert int(port) in LISTENS[host]
    assert int(config.http.listen.rpartition(":")[2]) in LISTENS["dbtstream"]


def test_the_daemon_writes_where_it_has_a_volume(config: Config) -> None:
    writable = [target for _, target, mode in mounts("dbtstream") if mode == "rw"]
    (flights,) = config.projects.values()
    for path in (config.worker.state_dir, flights.env["DBTSTREAM_DEMO_DB"]):
        assert any(path.startswith(f"{target}/") for target in writable), path
    read_only = [target for _, target, mode in mounts("dbtstream") if mode == "ro"]
    assert flights.profiles_dir in read_only
    assert "/etc/dbtstream/dbtstream.toml" in read_only
    assert SERVICES["dbtstream"]["tmpfs"] == ["/tmp:mode=1777"]


def test_tempo_listens_where_the_others_look() -> None:
    tempo = read_yaml(DEPLOY / "tempo" / "tempo.yaml")
    grpc = tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    ports = {tempo["server"]["http_listen_port"], int(grpc.rpartition(":")[2])}
    assert ports == LISTENS["tempo"]
    ((volume, _),) = [(target, mode) for _, target, mode in mounts("tempo") if mode == "rw"]
    storage = tempo["storage"]["trace"]
    for path in (storage["wal"]["path"], storage["local"]["path"]):
        assert path.startswith(f"{volume}/")


@pytest.mark.parametrize("service", ["prometheus", "tempo", "otel-collector", "nats"])
def test_each_is_started_with_a_config_that_is_mounted(service: str) -> None:
    (path,) = [
        word.partition("=")[2] or word
        for word in SERVICES[service]["command"]
        if "config" in word.partition("=")[0] or word.endswith(".conf")
    ]
    there = {target: DEPLOY / source for source, target, mode in mounts(service) if mode == "ro"}
    assert any(
        path == target or (there[target] / Path(path).name).is_file()
        for target in there
        if path.startswith(target)
    ), path


def test_dashboards_and_collector_name_the_services() -> None:
    """Each address in their files is one of compose.yaml's."""
    collector = (DEPLOY / "otel-collector" / "prometheus-tempo.yaml").read_text(encoding="utf-8")
    sources = [
        path.read_text(encoding="utf-8")
        for path in (DEPLOY / "grafana" / "provisioning" / "datasources").iterdir()
    ]
    assert set(re.findall(r"[ -]tempo:(\d+)", collector)) == {"4317"}
    assert set(re.findall(r"http://prometheus:(\d+)/api/v1/write", collector)) == {"9090"}
    assert "--web.enable-remote-write-receiver" in SERVICES["prometheus"]["command"]
    assert "0.0.0.0:4318" in collector
    urls = set(re.findall(r"url: http://([\w-]+):(\d+)", "".join(sources)))
    assert urls == {("prometheus", "9090"), ("tempo", "3200")}
    scraped = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    assert '"dbtstream:9464"' in scraped
