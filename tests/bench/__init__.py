"""What the gateway costs, beside peers measured in the same run: `make bench`, and `make bench-curves` for how costs grow.

The figure that survives a noisy machine is the CPU time of the process under test per streamed token: user and system
time of that process from the kernel, before and after, divided by the tokens. What stands in for vLLM and the load run in
processes of their own. Quote ratios of one run, never the times of two.

`results.json` and `curves.json` are the runs that `server/README.md` states. `make bench-docs` replaces them by the last
runs; `make bench-guard` compares a short run with them.
"""
