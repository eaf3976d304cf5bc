"""HTTP/1.1 to a provider: an httpx transport over asyncio's protocols and llhttp, the parser of Node.js (`httptools`).

Reasons for a transport of our own: the gateway guarantees that a broken answer never ends with OK and that no byte of one answer
reaches another call, and it reports errors of a provider precisely. aiohttp closes the socket on broken chunked encoding while
the reader of the body waits, gives bytes that arrive on an idle connection to the next request, and reads trailers, chunk
extensions and 1xx responses without limit. httpx's own transport returns one chunk per iteration at several times the CPU cost.
This package has only what the gateway needs: requests with a body of known length, streamed responses, a pool for each origin. It
has no proxies, redirects, cookies, compression, HTTP/2 or methods without a response body (HEAD).

    Transport ── one pool for each origin ──▶ Connection ── one for each request ──▶ Exchange
    `client`     `client`                     `connection`                           `exchange`

An `Exchange` has its own parser, so no parser state outlives a response. A connection is reused only after a complete response,
and only if no bytes arrived after it. `dial` opens connections; `errors` has the exceptions.
"""
