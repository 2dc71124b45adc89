"""The service: recommendations over HTTP from a bundle, an event log and a history cache.

recommend  one request, top to bottom: read, encode, retrieve, exclude, rank, respond
bundles    the live bundle with the live catalogue on top; hot swap
history    a user's newest events in Redis, rebuilt from the log
ingest     the event log
catalogue  the live catalogue: changes to items since the bundle was made
main       create_app and its lifespan
routes     the HTTP side: parse, call, render
"""

import os

# BLAS and OpenMP read these once, when numpy or onnxruntime is first imported, and size their pools by the host's
# cores. A worker is one thread of work: pools of several workers would fight for the same cores, and a product of one
# query with the vectors then waits for threads (45 ms instead of 4 at the 99th percentile). So they are set here, the
# first line of ours that runs, for every way to start the service; who sets them outside keeps what they set.
for _pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_pool, "1")
