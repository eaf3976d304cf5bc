"""The commands and the Python of README.md, after `make run` with the small vLLM that it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import Block, blocks, matches
from tests.e2e.support import CALL_SECONDS, ROOT, RUN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = pytest.mark.e2e

BIN = Path(sys.executable).parent
GATEWAY, VLLM = "127.0.0.1:50051", "127.0.0.1:8000"
RUN_BLOCKS = [block for block in blocks(ROOT / "README.md") if block.language in ("sh", "python")]
EXPECTED = {
    "chat/completions": '"object":"chat.completion"',
    "buf curl": '"completed"',
    "--check-config": "base_url",
    "import Client": "STOP_REASON_",
}
"""What standard output contains, by a part of the command; other commands must print something."""


@pytest.fixture(scope="module")
def addresses() -> Iterator[Mapping[str, str]]:
    """The addresses that `make run` serves on, by the addresses in the README. It starts its own vLLM."""
    foreign = {name for name in os.environ if name.startswith(("DELTAWIRE_", "VLLM_"))}
    variables = {name: value for name, value in os.environ.items() if name not in foreign}
    with subprocess.Popen(
        [*RUN, "--port", "0"], cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            output = ""
            for line in process.stdout:
                output += line
                if "serving until" in line:
                    break
            vllm = re.search(r"^run: vLLM: warm .* at http://([\d.:]+); it needs no key$", output, re.MULTILINE)
            gateway = re.search(r"^run: gateway: serving on ([\d.:]+);", output, re.MULTILINE)
            assert vllm, output
            assert gateway, output
            yield {VLLM: vllm[1], GATEWAY: gateway[1]}
        finally:
            process.terminate()
            process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("block", RUN_BLOCKS, ids=lambda block: f"line-{block.line}")
def test_a_block_prints_what_the_readme_shows(block: Block, addresses: Mapping[str, str]) -> None:
    """A block exits with 0 and prints the shown output; only the addresses and the path of `.venv` are replaced."""
    text = block.text.replace(".venv/bin/", f"{BIN}/")
    for written, address in addresses.items():
        text = text.replace(written, address)
    command = [sys.executable, "-"] if block.language == "python" else ["bash", "-euo", "pipefail", "-s"]
    done = subprocess.run(
        command,
        input=text,
        cwd=ROOT,
        env={**os.environ, "DELTAWIRE_TARGET": addresses[GATEWAY], "DELTAWIRE_TOKEN": ""},
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    for part, expected in EXPECTED.items():
        if part in block.text:
            assert expected in done.stdout
    if block.output is not None:
        assert matches(done.stdout, block.output), done.stdout


def test_every_expectation_has_a_command() -> None:
    """Each key of `EXPECTED` is part of a command in the README."""
    assert all(any(part in block.text for block in RUN_BLOCKS) for part in EXPECTED)
