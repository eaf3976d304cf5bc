"""What the gateway measures for Prometheus.

    table      every metric, with its labels; other packages count with them
    process    measures the process itself
    listener   serves them over HTTP: `metrics.listen`

With several workers, each writes its values to files in the gateway's private directory, and the parent process serves their sum.

May use: telemetry, errors and the modules beside it.
"""
