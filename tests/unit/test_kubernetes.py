"""The manifests of docs/how-to/kubernetes.md say what the command line takes, and agree with each other."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml

from mcp_pg_events import PostgresStore
from mcp_pg_events.cli import app as command_line
from mcp_pg_events.cli.retention import TRY_AGAIN
from tests.unit.test_docs import DOCS, VARIABLE, blocks

PAGE = DOCS / "how-to/kubernetes.md"


def manifests() -> list[dict[str, Any]]:
    return [document for block in blocks("yaml") if block.page == PAGE for document in yaml.safe_load_all(block.text)]


def of_kind(kind: str) -> dict[str, Any]:
    [found] = [document for document in manifests() if document["kind"] == kind]
    return found


def pod(document: dict[str, Any]) -> dict[str, Any]:
    """What its pods are made from."""
    spec = document["spec"]
    if document["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    found: dict[str, Any] = spec["template"]["spec"]
    return found


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in manifests():
        if document["kind"] in ("Deployment", "Job", "CronJob"):
            yield from ((document["kind"], container) for container in pod(document)["containers"])


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options as the command takes them; it fails on one that there is not."""
    name, *rest = arguments
    group: Any = typer.main.get_command(command_line)
    parameters: dict[str, Any] = group.commands[name].make_context(name, rest).params
    return parameters


def commands() -> dict[str, dict[str, Any]]:
    found = {}
    for kind, container in containers():
        command = container["command"]
        if command[:2] == ["sh", "-c"]:
            command = shlex.split(command[2].partition(" || ")[0])
        assert command[0] == "mcp-pg-events"
        found[kind] = parsed(command[1:])
    return found


def test_the_commands_take_their_options() -> None:
    said = commands()
    assert said["Job"]["worker_role"] == "app"
    assert said["CronJob"]["ttl"].days == 7
    assert said["Deployment"]["workers"] == 1
    with pytest.raises(Exception, match="No such option"):
        parsed(["serve", "weather:mcp", "--worker", "4"])


def test_the_variables_and_secrets_are_there() -> None:
    documented = set(VARIABLE.findall((DOCS / "reference/settings.md").read_text(encoding="utf-8")))
    secret = of_kind("Secret")
    for kind, container in containers():
        for variable in container["env"]:
            assert variable["name"] in documented
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == secret["metadata"]["name"]
            assert reference["key"] in secret["stringData"]
            owner = reference["key"] == "owner-dsn"
            assert owner == (kind != "Deployment"), "a server's pods do not get the owner's DSN"


def test_the_probes_ask_the_routes_and_the_port_that_there_are() -> None:
    said = commands()["Deployment"]
    [container] = pod(of_kind("Deployment"))["containers"]
    [port] = container["ports"]
    assert port["containerPort"] == said["port"]
    for probe, path in (("startup", "live_path"), ("liveness", "live_path"), ("readiness", "ready_path")):
        asked = container[f"{probe}Probe"]
        assert asked["httpGet"] == {"path": said[path], "port": port["name"]}
        assert asked["timeoutSeconds"] >= 2, "an answer may take a second"
    assert of_kind("Service")["spec"]["ports"][0]["targetPort"] == port["name"]


def test_a_pod_has_time_to_leave_the_service_and_to_drain() -> None:
    template = pod(of_kind("Deployment"))
    [container] = template["containers"]
    word, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    drain = inspect.signature(PostgresStore).parameters["drain_timeout"].default
    assert template["terminationGracePeriodSeconds"] > int(seconds) + drain + 5


def test_the_labels_agree() -> None:
    deployment = of_kind("Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert of_kind("Service")["spec"]["selector"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels


def test_a_pass_that_leaves_something_for_the_next_one_does_not_fail_its_job() -> None:
    [container] = pod(of_kind("CronJob"))["containers"]
    assert container["command"][2].endswith(f" || [ $? -eq {TRY_AGAIN} ]")


def test_the_page_says_where_it_was_applied() -> None:
    assert "**These manifests were applied to no cluster.**" in PAGE.read_text(encoding="utf-8")
