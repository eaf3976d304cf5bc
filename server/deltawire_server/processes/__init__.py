"""Several worker processes on one port, as one gateway: `server.workers`.

    parent ── spawns, watches, signals ──▶ worker 0 … N-1: each a whole gateway, all on the same port
    worker ── passes calls on, over a private unix socket ──▶ the worker that has the completion

`parent` runs in the process that was started, which serves nothing and does not import gRPC. `worker_process` identifies a
worker and the worker of each completion. `passing` passes calls on. With one worker, nothing of this package is used.

May use: rpc and the packages below it.
"""
