"""The completions of this process, by id: what is under way, what is retained, and for a while what became of the others.

`records` knows them all, for cancel and look-up; `retention` keeps the messages of those that can be resumed. Neither runs
anything: that is `completion`'s and `worker`'s part. No gRPC, no HTTP.
"""
