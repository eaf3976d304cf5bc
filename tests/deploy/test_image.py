"""The image: built with `make image` by a container engine, and run by it as a hardened host does."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltawire import __version__
from tests.deploy.engine import DOCKER, run, serving

if TYPE_CHECKING:
    from deltawire_server.fake_vllm import FakeVllm
    from tests.deploy.engine import Engine

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("image")]


def test_the_dockerfile_has_no_findings() -> None:
    """Hadolint knows what is dangerous, and what makes images large or different at every build."""
    assert run(Path(sys.executable).with_name("hadolint"), DOCKER / "Dockerfile") == ""


def test_the_image_says_what_it_is(image: dict[str, Any]) -> None:
    """A user by number, the gateway itself as the first process, the ports of the settings, the version."""
    config = image["Config"]
    settings = tomllib.loads((DOCKER / "deltawire.toml").read_text("utf-8"))
    listeners = [settings["server"]["listen"], settings["metrics"]["listen"]]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["deltawire-server"]
    assert [*config["ExposedPorts"]] == [f"{listener.rpartition(':')[2]}/tcp" for listener in listeners]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert len(config["Labels"]["org.opencontainers.image.revision"]) == 40


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_container_serves_and_drains(
    engine: Engine, image: dict[str, Any], vllm: FakeVllm, workers: int
) -> None:
    """One worker writes no file, several need /tmp; no process is root's; SIGTERM reaches the gateway, which drains."""
    arguments, flags = [], []
    if workers > 1:
        arguments = [f"--workers={workers}", "--database-url=sqlite:////tmp/registry.db"]
        flags = ["--tmpfs=/tmp"]
    async with serving(engine, image, vllm.base_url, *arguments, flags=flags) as container:
        assert await asyncio.to_thread(container.users) == {"65532"}
