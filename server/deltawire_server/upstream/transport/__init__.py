"""HTTP/1.1 to a provider: an httpx transport over asyncio's protocols and llhttp, the parser of Node.js (`httptools`).

Why not a library's own transport: the gateway promises that no broken answer ends OK and that no byte of one answer
reaches another call, and it reports what a provider did wrong in plain words. aiohttp closes the socket on broken chunked
encoding and leaves the reader of the body waiting, gives what arrives on an idle connection to the next request, and reads
trailers, chunk extensions and 1xx responses without bound. httpx's own transport returns one chunk per iteration at several
times the CPU cost. This package does only what the gateway needs: requests with a whole body, responses as streams, a pool
for each origin. It has no proxies, redirects, cookies, compression, HTTP/2 or methods without a response body (HEAD).

    Transport ── one pool for each origin ──▶ Connection ── one for each request ──▶ Exchange
    `client`     `client`                     `connection`                           `exchange`

An `Exchange` has its own parser, so nothing of one response outlives it. A connection is used again only after a response
that was complete, and only if nothing arrived after it. `dial` makes connections; `errors` has what is raised.
"""
