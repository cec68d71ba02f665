"""The trainer: configuration, data, the policy, the loop, checkpoints and reports.

It stands on transformers, accelerate and datasets (`pip install "fastpo[train]"`); `config`,
`checkpoint` and `errors` need
none of them, so that help is fast.
"""
