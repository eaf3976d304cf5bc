"""Usage records: who used which model, and how many tokens, as JSON lines in files.

    worker ── UsageLog.record ──▶ UsageRecord: `begin` before the request is sent to the engine, `end` at the end of the completion
                                       └──▶ usage-2026-11-28-ab120000-0001.jsonl    ──▶ `python -m deltawire_server.usage FOLDER`

    lines    the form of a line
    log      writes them: rotation, retention, failures
    report   reads them and sums them up

Each process writes files of its own, with whole lines, in the task that runs the completion. So a process that is killed loses
no line: a completion with only its first line is one whose process ended before it, or which still runs.

May use: sansio and the packages below it.
"""
