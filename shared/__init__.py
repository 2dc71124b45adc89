"""What trainer and service share: contracts, and the code that keeps them on both sides.

    times      epoch microseconds and RFC 3339
    events     events, the history policy, `history_of`
    sequences  packing histories for an encoder
    catalogue  items, numbering, availability
    popularity daily counts and `popular(as_of, window)`
    encoder    an ONNX encoder: packed histories to query vectors
    retrieval  exact slice, HNSW, and the planner between them
    bundle     the immutable directory that the trainer publishes and the service loads
    database   the tables of the log and the live catalogue

Import rule: `service -> shared <- trainer`. Nothing here imports torch or fastapi.

Shape letters used in comments everywhere: B batch, T time, D width, H heads, N items, K results.
"""
