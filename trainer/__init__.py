"""The offline side: from an event log to a published bundle.

    sources      anybody's data -> two tables and a report
    dataset      tables -> numbered histories, splits, batches
    transformer  the network: one pre-norm encoder with a causal switch
    objectives   what SASRec and BERT4Rec minimise
    train        the loop (PyTorch Lightning): checkpoints, early stopping, resume
    evaluate     metrics by full ranking, in torch and through the bundle, beside popularity
    export       torch -> ONNX, with proof that both say the same
    publish      a verified bundle, live at once
    predict      top-K lists for all users

`python -m trainer --help` lists the commands.
"""
