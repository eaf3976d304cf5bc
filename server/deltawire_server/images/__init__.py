"""Fetches the images of a request that are given by URL, with protection against server-side request forgery (SSRF).

The gateway may reach hosts that its callers cannot, so a fetch must never connect to an internal host. The modules, in the order
of their use:

    urls        parses and normalizes a URL
    policy      the operator's limits: hosts, schemes, ports, sizes, timeouts
    addresses   which IP addresses are public
    connect     looks up names, validates every address, and connects only to validated addresses
    fetch       fetches one image, validates each redirect, and limits its bytes
    sniff       detects the media type
    load        all images of a request
    data_urls   decodes `data:` URLs
"""
