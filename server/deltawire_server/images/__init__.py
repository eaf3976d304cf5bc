"""Images that a request names by address: whether they may be fetched, and fetching them without being led astray.

A gateway stands where its callers do not, so what it fetches for them must never be a machine that only it can reach. In
the order in which a request meets them:

    urls        reads an address, in one form that nobody can read differently
    policy      what the operator allows: hosts, schemes, ports, sizes, times
    addresses   which IP addresses are public
    connect     looks names up, judges every address, and connects to nothing that was not judged
    fetch       one image: its redirects, each judged anew, and its bytes, counted
    sniff       what the bytes are
    load        all images of a request
    data_urls   addresses that hold the image themselves
"""
