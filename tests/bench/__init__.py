"""What the gateway costs, beside peers measured in the same run: `make bench`.

The figure that survives a noisy machine is the CPU time of the process under test per streamed token: user and system
time of that process from the kernel, before and after, divided by the tokens. What stands in for vLLM and the load run in
processes of their own. Quote ratios of one run, never the times of two.
"""
