"""The conformance kit: checks any client and any server of deltawire.v1. README.md says how to run it.

In the order of the files one needs to read:

    conformance.proto   what the driver and a client program exchange
    case.proto          what a case is
    fold                what the events of a stream add up to
    cases               loads the cases
    scripted_server     plays a case over HTTP/2
    client_driver       runs a client program through cases
    server_checks       the contract, as checks of a server that only has an address
    recorded            writes cases/recordings.jsonl and cases/reasons.jsonl
    __main__            `make conformance`: everything that is installed, as a table
"""
