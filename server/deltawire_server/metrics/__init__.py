"""What the gateway measures for Prometheus.

    table        every metric, with its labels; other packages count with them
    process      measures the process itself
    probes       whether the process is alive, and whether it accepts calls
    status_page  a page for people, from the same metrics
    listener     serves all of these over HTTP: `metrics.listen`

With several workers, each writes its values to files in the gateway's private directory, and the parent process serves their sum.

May use: telemetry, errors and the modules beside it.
"""
