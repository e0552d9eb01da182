"""Training data of the demo models: pictures drawn or read on the fly, questions, answers.

`sample.py` says what a sample is, one file per task draws them, `mixture.py` mixes the tasks and
sets questions aside for the tests. Nothing here knows of models, tokens or torch.
"""
