"""The completions of this process: running, retained, and for some time the results of the others.

`completion` runs one. `records` finds them by id, for cancel and look-up. `retention` keeps the messages of those that can be
resumed. No gRPC, no HTTP.
"""
