"""The manifests: rendered by kubectl, checked against Kubernetes' schemas, and against the gateway that they run."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deltawire_server import settings
from deltawire_server.metrics.table import STREAMS
from tests.deploy.engine import DOCKER, ROOT, run
from tests.metrics.test_listener import status

if TYPE_CHECKING:
    from tests.conftest import Certificates, StartGateway

pytestmark = pytest.mark.deploy

FOLDER = ROOT / "server/deploy/kubernetes"
KUBECTL = ROOT / ".cache/kubectl/kubectl"
WRAP_UP_SECONDS = 5
"""What the end of the process takes after drain_grace: the last spans have 2 seconds."""


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kubectl apply --kustomize` would send."""
    rendered = tmp_path_factory.mktemp("manifests") / "all.yaml"
    rendered.write_text(run(KUBECTL, "kustomize", FOLDER), encoding="utf-8")
    return rendered


@pytest.fixture(scope="module")
def objects(manifests: Path) -> dict[str, Any]:
    """The manifests by kind; there is one of each."""
    loaded = [*yaml.safe_load_all(manifests.read_text("utf-8"))]
    by_kind = {each["kind"]: each for each in loaded}
    assert len(by_kind) == len(loaded)
    return by_kind


@pytest.fixture(scope="module")
def secrets() -> dict[str, list[str]]:
    """The keys of the Secrets that the commands in `kustomization.yaml` create, by their names."""
    commands = [
        shlex.split(line.removeprefix("#"), comments=True)
        for line in (FOLDER / "kustomization.yaml").read_text("utf-8").splitlines()
        if line.startswith("#   kubectl create secret ")
    ]
    made = {}
    for _, _, _, kind, name, *flags in commands:
        given = [flag.removeprefix("--from-").partition("=")[2].partition("=")[0] for flag in flags]
        made[name] = ["tls.crt", "tls.key"] if kind == "tls" else given
    return made


@pytest.fixture
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    """The pod of the Deployment."""
    template: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return template


@pytest.fixture
def invocation(
    objects: dict[str, Any],
    pod: dict[str, Any],
    secrets: dict[str, list[str]],
    certificates: Certificates,
    tmp_path: Path,
) -> settings.Invocation:
    """The settings of the gateway in the pod: its arguments, its environment, and the files that are mounted."""
    contents = {
        "tls.crt": certificates.server.read_text(),
        "tls.key": certificates.server_key.read_text(),
        "keys": "ci all 0123456789abcdef\n",
        "database-url": "postgresql://user:password@host/name",
    }
    [container] = pod["containers"]
    sources = {each["name"]: each for each in pod["volumes"]}
    files = dict[str, str]()
    for mount in container["volumeMounts"]:
        source = sources[mount["name"]]
        if "configMap" in source:
            config = objects["ConfigMap"]
            assert config["metadata"]["name"] == source["configMap"]["name"]
            found = config["data"]
        else:
            held = secrets[source["secret"]["secretName"]]
            items = source["secret"].get("items", [{"key": key, "path": key} for key in held])
            assert {item["key"] for item in items} <= {*held}
            found = {item["path"]: contents[item["key"]] for item in items}
        files |= {f"{mount['mountPath']}/{name}": text for name, text in found.items()}
    # Below a folder of the test instead of /, also where the files name one another.
    for name, text in files.items():
        (tmp_path / name[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name[1:]).write_text(text.replace('"/', f'"{tmp_path}/'))
    variables = {}
    for variable in container["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert reference["key"] in secrets[reference["name"]]
        variables[variable["name"]] = contents[reference["key"]]
    arguments = [f"{tmp_path}{word}" if word.startswith("/") else word for word in container["args"]]
    server = Path(sys.executable).with_name("deltawire-server")
    run(server, *arguments, "--check-config", env=os.environ | variables)
    return settings.parse(arguments, variables)


def test_the_manifests_follow_their_schemas(manifests: Path) -> None:
    """Strictly: unknown fields are errors too."""
    run(Path(sys.executable).with_name("kubernetes-validate"), "--strict", manifests)


def test_the_ports_are_those_of_the_settings(
    objects: dict[str, Any], pod: dict[str, Any], invocation: settings.Invocation
) -> None:
    """Of the container, and all that name them; and its callers are those of the Secret."""
    gateway = invocation.settings
    assert [caller.name for caller in gateway.access.principals] == ["ci"]
    [container] = pod["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert gateway.server.listen == (f"0.0.0.0:{ports['grpc']}",)
    assert gateway.metrics.listen == f"0.0.0.0:{ports['metrics']}"
    [service] = objects["Service"]["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (ports["grpc"], "grpc")
    admitted = [port["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert admitted == ["grpc", "metrics"]


async def test_the_gateway_answers_the_probes(pod: dict[str, Any], start_gateway: StartGateway) -> None:
    """While it serves, all of them succeed, at the port of the metrics."""
    [container] = pod["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["port"] for probe in probes} == {"metrics"}
    async with start_gateway(metrics={"listen": "127.0.0.1:0"}) as running:
        address = running.gateway.metrics_address
        for probe in probes:
            assert (await asyncio.to_thread(status, address, probe["path"]))[0] == 200


def test_the_pod_is_left_alone_until_it_has_drained(pod: dict[str, Any], invocation: settings.Invocation) -> None:
    """Kubernetes kills it only after all that the gateway may take."""
    server = invocation.settings.server
    assert pod["terminationGracePeriodSeconds"] >= server.drain_delay + server.drain_grace + WRAP_UP_SECONDS


def test_every_selector_means_the_gateways(objects: dict[str, Any]) -> None:
    """And the rules of the network policy do not."""
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels
    policy = objects["NetworkPolicy"]["spec"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        policy["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    peers += [peer for rule in policy["egress"] for peer in rule["to"]]
    assert all(peer.get("podSelector", {}).get("matchLabels") != labels for peer in peers)


def test_the_pod_is_restricted(objects: dict[str, Any], pod: dict[str, Any]) -> None:
    """As the pod security standard of that name asks, and with the user of the image."""
    [container] = pod["containers"]
    user = f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n"
    assert user in (DOCKER / "Dockerfile").read_text("utf-8")
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]
    assert pod["automountServiceAccountToken"] is False


def test_the_autoscaler_reads_a_metric_of_the_gateway(objects: dict[str, Any]) -> None:
    """A gauge for each pod."""
    [metric] = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == next(iter(STREAMS.describe())).name


@pytest.mark.parametrize("name", ["pod-monitor.yaml", "istio.yaml"])
def test_the_examples_name_what_exists(objects: dict[str, Any], name: str) -> None:
    """They say that they are not validated; here their references are looked up."""
    text = (FOLDER / "examples" / name).read_text("utf-8")
    assert text.startswith("# Not validated")
    service = objects["Service"]
    examples = list(yaml.safe_load_all(text))
    assert all(each["spec"] for each in examples)
    named = {each["metadata"]["name"]: each["spec"] for each in examples if each["kind"] == "Service"}
    for each in examples:
        spec = each["spec"]
        if each["kind"] == "Service":
            assert spec["selector"] == service["spec"]["selector"]
            assert spec["ports"][0]["targetPort"] in {port["name"] for port in service["spec"]["ports"]}
        elif each["kind"] == "PodMonitor":
            assert spec["selector"]["matchLabels"] == service["spec"]["selector"]
            assert [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]] == ["metrics"]
        elif each["kind"] == "DestinationRule":
            assert spec["host"] in named
        else:
            [route] = spec["http"][0]["route"]
            assert spec["hosts"] == [route["destination"]["host"]]
            assert route["destination"]["port"]["number"] in {
                port["port"] for port in named[route["destination"]["host"]]["ports"]
            }
