"""The status page in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.metrics.document import Document
from tests.polyglot.browser import HEADLESS
from tests.polyglot.programs import run, tool
from tests.support.gateway import running, settings_of

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm

pytestmark = pytest.mark.polyglot


async def test_chromium_shows_the_page(vllm: FakeVllm, tmp_path: Path) -> None:
    """With its tables and its style, which the page's own policy permits: the browser complains of nothing."""
    async with running(settings_of(vllm.base_url, tmp_path, metrics={"listen": "127.0.0.1:0"})) as gateway:
        await gateway.create()
        page = f"http://{gateway.gateway.metrics_address}/"
        shown = await run(tool("chromium"), *HEADLESS, "--enable-logging=stderr", "--dump-dom", page, home=tmp_path)
    assert shown.status == 0, shown.err
    assert "CONSOLE" not in shown.err
    document = Document(shown.out.encode())
    assert "accepts calls" in document.text
    # Other tests of this process had gateways too, whose replicas its metrics still have.
    states = {row["replica"]: row["state"] for row in document.rows("Replicas")}
    assert states[f"{vllm.base_url}/v1"] == "available"
    assert "deltawire.v1.ChatCompletion/CreateChatCompletion" in {row["method"] for row in document.rows("Calls")}
