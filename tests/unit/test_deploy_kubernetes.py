"""The manifests: each valid by Kubernetes' own schemas, and all of them about the same thing.

Nothing here was applied to a cluster. The two kinds that come from elsewhere are compared with
a list of the fields that their documentation has.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest

from dbtstream.config import Config, load_config
from dbtstream.consumer import durable_name
from dbtstream.daemon import stop_budget_s
from dbtstream.subjects import RUNS, RUNS_STREAM
from tests.deploy import DEPLOY, instructions, read_yaml

FOLDER = DEPLOY / "kubernetes"
CORE = ("serviceaccount", "service", "statefulset", "poddisruptionbudget", "networkpolicy")
FOREIGN = ("servicemonitor", "scaledobject")
VERSIONS = ("1.29", "1.37")

# Of the documentation of KEDA 2.19 and of the Prometheus operator's API; what we use must be in it.
HPA_RULES = {"stabilizationWindowSeconds", "policies", "selectPolicy", "tolerance"}
DOCUMENTED: dict[str, set[str]] = {
    "scaledobject spec": {
        *("scaleTargetRef", "pollingInterval", "cooldownPeriod", "initialCooldownPeriod"),
        *("idleReplicaCount", "minReplicaCount", "maxReplicaCount", "fallback"),
        *("advanced", "triggers"),
    },
    "scaledobject spec.scaleTargetRef": {"apiVersion", "kind", "name", "envSourceContainerName"},
    "scaledobject spec.advanced": {
        *("restoreToOriginalReplicaCount", "horizontalPodAutoscalerConfig", "scalingModifiers"),
    },
    "scaledobject spec.advanced.scalingModifiers": {
        *("target", "activationTarget", "metricType", "formula"),
    },
    "scaledobject spec.advanced.horizontalPodAutoscalerConfig": {"name", "behavior"},
    "scaledobject spec.advanced.horizontalPodAutoscalerConfig.behavior": {"scaleUp", "scaleDown"},
    "scaledobject spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown": HPA_RULES,
    "scaledobject spec.triggers": {
        *("type", "name", "metadata", "authenticationRef", "metricType", "useCachedMetrics"),
    },
    "scaledobject spec.triggers.metadata": {
        *("natsServerMonitoringEndpoint", "account", "stream", "consumer", "lagThreshold"),
        *("activationLagThreshold", "useHttps"),
    },
    "servicemonitor spec": {
        *("jobLabel", "targetLabels", "podTargetLabels", "endpoints", "selector"),
        *("namespaceSelector", "sampleLimit", "targetLimit", "labelLimit", "attachMetadata"),
    },
    "servicemonitor spec.endpoints": {
        *("port", "targetPort", "path", "scheme", "params", "interval", "scrapeTimeout"),
        *("honorLabels", "honorTimestamps", "relabelings", "metricRelabelings", "tlsConfig"),
    },
}


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = read_yaml(FOLDER / f"{name}.yaml")
    return loaded


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("statefulset")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return dict(only)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """dbtstream.toml as a worker loads it, but for where the project is."""
    (tmp_path / "dbt_project.yml").touch()
    text = (FOLDER / "dbtstream.toml").read_text(encoding="utf-8")
    copy = tmp_path / "dbtstream.toml"
    copy.write_text(text.replace('path = "/srv/shop"', f'path = "{tmp_path}"'), encoding="utf-8")
    return load_config(copy, {})


# -- each for itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CORE)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    kubernetes_validate.validate(manifest(name), version, strict=True)


def test_it_would_not_take_a_misspelt_field() -> None:
    wrong = manifest("statefulset")
    wrong["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 160
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond'"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("place", DOCUMENTED)
def test_the_other_kinds_use_documented_fields_only(place: str) -> None:
    name, _, path = place.partition(" ")
    tables = [manifest(name)]
    for step in path.split("."):
        found = [table[step] for table in tables]
        tables = [
            item for value in found for item in (value if isinstance(value, list) else [value])
        ]
    assert tables
    assert {key for table in tables for key in table} <= DOCUMENTED[place]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="this machine has no kubectl")
@pytest.mark.parametrize("with_all", [False, True])
def test_kustomize_builds_it(tmp_path: Path, with_all: bool) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "kubernetes")
    file = folder / "kustomization.yaml"
    if with_all:
        file.write_text(file.read_text(encoding="utf-8").replace("  # - ", "  - "), "utf-8")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = done.stdout.split("\n---\n")
    assert len(built) == len(CORE) + 1 + (len(FOREIGN) if with_all else 0)
    assert done.stdout.count("  namespace: dbtstream\n") >= len(built)
    # The name that kustomize gives the ConfigMap is the one that the pod mounts.
    assert done.stdout.count("name: dbtstream-") == 2
    assert "image: registry.example.com/dbtstream-shop:" in done.stdout


# -- with each other ----------------------------------------------------------------------------


def test_kustomization_names_every_file() -> None:
    text = (FOLDER / "kustomization.yaml").read_text(encoding="utf-8")
    for name in CORE:
        assert f"\n  - {name}.yaml\n" in text
    for name in FOREIGN:
        assert f"\n  # - {name}.yaml " in text
    there = {path.name for path in FOLDER.iterdir()}
    assert there == {
        *(f"{name}.yaml" for name in CORE + FOREIGN),
        *("kustomization.yaml", "dbtstream.toml"),
    }
    assert read_yaml(FOLDER / "kustomization.yaml")["configMapGenerator"] == [
        {"name": "dbtstream", "files": ["dbtstream.toml"]}
    ]


def test_everything_selects_the_same_pods() -> None:
    labels = manifest("statefulset")["spec"]["template"]["metadata"]["labels"]
    assert manifest("statefulset")["spec"]["selector"]["matchLabels"] == labels
    (spread,) = pod()["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("poddisruptionbudget")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"] == labels
    # The ServiceMonitor selects the Service, by the Service's own labels.
    monitor = manifest("servicemonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= (
        manifest("service")["metadata"]["labels"].items()
    )
    assert monitor["jobLabel"] in manifest("service")["metadata"]["labels"]
    target = manifest("scaledobject")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", "dbtstream")
    assert manifest("statefulset")["spec"]["serviceName"] == manifest("service")["metadata"]["name"]
    assert pod()["serviceAccountName"] == manifest("serviceaccount")["metadata"]["name"]


def test_one_port_everywhere(config: Config) -> None:
    host, _, number = config.http.listen.rpartition(":")
    assert host == "0.0.0.0"  # noqa: S104  # the kubelet asks from outside of the pod
    assert container()["ports"] == [{"name": "http", "containerPort": int(number)}]
    (port,) = manifest("service")["spec"]["ports"]
    assert (port["name"], port["port"], port["targetPort"]) == ("http", int(number), "http")
    (ingress,) = manifest("networkpolicy")["spec"]["ingress"]
    assert ingress["ports"] == [{"port": "http"}]
    (endpoint,) = manifest("servicemonitor")["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_probes_ask_what_the_daemon_answers() -> None:
    paths = {
        probe: container()[probe]["httpGet"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {
        "startupProbe": {"path": "/livez", "port": "http"},
        "livenessProbe": {"path": "/livez", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
    }


def test_the_kubelet_waits_longer_than_all_steps_of_a_stop_together(config: Config) -> None:
    assert pod()["terminationGracePeriodSeconds"] > stop_budget_s(config.worker)


def test_egress_goes_where_the_config_says(config: Config) -> None:
    ports = {
        port["port"]
        for rule in manifest("networkpolicy")["spec"]["egress"]
        for port in rule["ports"]
    }
    named = {int(url.rpartition(":")[2]) for url in config.nats.servers}
    assert config.telemetry.otlp is not None
    named.add(int(config.telemetry.otlp.endpoint.rpartition(":")[2]))
    assert ports == {53, 443, *named}


def test_what_the_config_names_is_mounted(config: Config) -> None:
    mounts = [mount["mountPath"] for mount in container()["volumeMounts"]]
    shop = config.projects["shop"]
    assert config.nats.nkey_seed_file is not None
    assert config.nats.tls_ca_file is not None
    for path in (
        *(config.nats.nkey_seed_file, config.nats.tls_ca_file, config.worker.state_dir),
        *(ref.file or "" for ref in shop.secrets.values()),
    ):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path
    volumes = {volume["name"] for volume in pod()["volumes"]} | {
        claim["metadata"]["name"]
        for claim in manifest("statefulset")["spec"]["volumeClaimTemplates"]
    }
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes
    # The root is read-only: what is written to is a volume.
    assert {"/tmp", "/var/lib/dbtstream"} <= set(mounts)


def test_the_pod_is_as_the_image_wants_it(config: Config) -> None:
    image = dict(instructions(DEPLOY / "docker" / "Dockerfile"))
    (user, group) = map(int, image["USER"].split(":"))
    security = pod()["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (
        *(user, group),
        group,
    )
    assert image["VOLUME"] in [mount["mountPath"] for mount in container()["volumeMounts"]]
    assert "/opt/dbt" in image["COPY"]
    assert config.projects["shop"].python == "/opt/dbt/bin/python"
    # The restricted profile of Kubernetes' pod security standards.
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_no_secret_is_in_it() -> None:
    kinds = {manifest(name)["kind"] for name in CORE + FOREIGN}
    assert "Secret" not in kinds
    assert "env" not in container()


def test_keda_asks_for_the_consumer_of_each_target(config: Config) -> None:
    spec = manifest("scaledobject")["spec"]
    consumers = {trigger["name"]: trigger["metadata"] for trigger in spec["triggers"]}
    assert {name: found["consumer"] for name, found in consumers.items()} == {
        f"{name}_{target}": durable_name(f"{RUNS}.{name}.{target}")
        for name, project in config.projects.items()
        for target in project.targets
    }
    assert {found["stream"] for found in consumers.values()} == {RUNS_STREAM}
    roles = (DEPLOY / "nats" / "roles.conf").read_text(encoding="utf-8")
    for found in consumers.values():
        assert f"\n  {found['account']}: {{\n    jetstream: enabled" in roles
        # Unused beside a formula, but a scaler does not load without a number here.
        assert found["lagThreshold"].isdecimal()
    modifiers = spec["advanced"]["scalingModifiers"]
    assert modifiers["target"] == str(config.worker.slots)
    assert modifiers["formula"] == " + ".join(f"({name} > 0 ? 1.0 : 0.0)" for name in consumers)
    assert spec["minReplicaCount"] >= 1
