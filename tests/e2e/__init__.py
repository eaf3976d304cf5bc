"""The main path on a real vLLM: `make e2e`.

One vLLM and one gateway, a process each, serve all tests; each test has a client of its own. What the small model says by
itself is not worth checking, so answers are pinned down where they matter: by a grammar of one literal, by a schema, or
by the number of tokens. Nothing here is timed. `test_failures` runs last: it ends the vLLM that the others need.
"""
